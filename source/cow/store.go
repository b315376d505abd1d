package cow

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/eintr"
	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
)

// The type system has functions for the system calls that this package makes, except
// reads. Tests replace these functions.
type system struct {
	pwrite    func(f *os.File, p []byte, off int64) (int, error)
	fdatasync func(f *os.File) error
	fallocate func(f *os.File, mode uint32, off, n int64) error
	lock      func(f *os.File) error // flock, exclusive, without waiting
	// maxFile is the size in bytes of the largest file that may be created. 0 means
	// that the file system decides.
	maxFile int64
}

func kernel() system {
	return system{
		pwrite:    (*os.File).WriteAt,
		fdatasync: func(f *os.File) error { return eintr.Retry(func() error { return unix.Fdatasync(int(f.Fd())) }) },
		fallocate: func(f *os.File, mode uint32, off, n int64) error {
			return eintr.Retry(func() error { return unix.Fallocate(int(f.Fd()), mode, off, n) })
		},
		lock: func(f *os.File) error {
			return eintr.Retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
		},
	}
}

// store is the file of a layer: the headers, the pages of the table, and the blocks.
// The position of a block in the file is the offset of the block in the disk plus
// layout.data. A temporary layer has no header. It consists of several files if the
// file system does not support a single file that is large enough.
type store struct {
	layout
	name      string // what errors call the layer
	temporary bool
	found     bool // the layer existed before
	files     []*os.File
	part      int64 // number of bytes of the disk in each file
	sys       system
}

// openStore opens or creates the layer at the given path. The parameter want is the
// header that a new layer gets. The header of an existing layer must agree with it. If
// the path is empty, openStore creates a temporary layer.
func openStore(path string, want header, sys system) (s *store, err error) {
	if path == "" {
		return temporaryStore(want, sys)
	}
	f, made, err := openOrMake(path)
	if err != nil {
		return nil, fmt.Errorf("cow: %w", err)
	}
	defer func() {
		if err != nil {
			if made {
				os.Remove(path)
			}
			f.Close()
			err = fmt.Errorf("copy-on-write file %s: %w", path, err)
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("the layer must be a regular file, not %s", info.Mode())
	}
	if err := sys.lock(f); errors.Is(err, unix.EWOULDBLOCK) {
		made = false // another process is creating the layer, so that the file must stay
		return nil, errors.New("the layer is in use by another process")
	} else if err != nil {
		return nil, fmt.Errorf("cannot lock the layer: %w", err)
	}
	// The size of the file is read again after the file was locked, because another
	// process may have created the layer in the meantime.
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	s = &store{name: path, files: []*os.File{f}, found: info.Size() > 0, sys: sys}
	made = made && !s.found
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
		made = false // the path now names another file, which must stay
		return nil, errors.New("the file was removed by another process while it was being opened")
	}
	if !s.found {
		if err := s.create(path, want); err != nil {
			return nil, errors.Join(err, f.Truncate(0)) // leave the file as it was found
		}
		return s, nil
	}
	have, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	if err := have.differs(want); err != nil {
		return nil, err
	}
	if s.layout, err = newLayout(have.Size, have.BlockSize); err != nil {
		return nil, err
	}
	if end := s.data + s.size; info.Size() != end {
		return nil, fmt.Errorf("the layer file has %d bytes, want %d bytes for a disk of %d bytes: the layer file is truncated or damaged", info.Size(), end, s.size)
	}
	s.part = max(s.size, 1)
	return s, nil
}

// openOrMake opens a file for reading and writing, and creates it if it does not
// exist. It also reports whether it created the file.
func openOrMake(path string) (f *os.File, made bool, err error) {
	// If the path names a FIFO, O_NONBLOCK prevents OpenFile from waiting until another
	// process opens the FIFO.
	const flags = os.O_RDWR | unix.O_NONBLOCK
	f, err = os.OpenFile(path, flags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o600)
		made = err == nil
	}
	return f, made, err
}

// The method create writes the headers of a new layer to an empty file, and makes them
// durable.
func (s *store) create(path string, want header) (err error) {
	if want.BlockSize == 0 {
		want.BlockSize = DefaultBlockSize
	}
	if s.layout, err = newLayout(want.Size, want.BlockSize); err != nil {
		return err
	}
	s.part = max(s.size, 1)
	f := s.files[0]
	slot, err := want.encode()
	if err != nil {
		return err
	}
	if err := s.resize(f, s.data+s.size); err != nil {
		if tooLarge(err) {
			err = fmt.Errorf("the layer of a disk of %d bytes is a sparse file of that size, which this file system does not support (%w); put the layer on XFS or btrfs, or use a temporary layer", s.size, err)
		}
		return err
	}
	for i := range headers {
		if _, err := s.sys.pwrite(f, slot, i*slotSize); err != nil {
			return err
		}
	}
	if err := s.sys.fdatasync(f); err != nil {
		return fmt.Errorf("fdatasync: %w", err)
	}
	return durable.SyncFolder(filepath.Dir(path))
}

// maxPart is for temporary layers that consist of several files. It is the number of
// bytes of the disk that each of these files stores. It is half of 16 TiB, the size
// of the largest file on ext4, so that the table fits in as well.
const maxPart = 8 << 40

// maxFiles limits the number of files of a temporary layer.
const maxFiles = 128

func temporaryStore(want header, sys system) (_ *store, err error) {
	if want.BlockSize == 0 {
		want.BlockSize = DefaultBlockSize
	}
	dir := os.TempDir()
	s := &store{name: filepath.Join(dir, "(temporary copy-on-write file)"), temporary: true, sys: sys}
	defer func() {
		if err != nil {
			s.close()
			err = fmt.Errorf("temporary copy-on-write file in %s: %w", dir, err)
		}
	}()
	if s.layout, err = newLayout(want.Size, want.BlockSize); err != nil {
		return nil, err
	}
	s.part = max(s.size, 1)
	for begin := int64(0); begin < max(s.size, 1); begin += s.part {
		f, err := unnamed(dir)
		if err != nil {
			return nil, err
		}
		s.files = append(s.files, f)
		err = s.resize(f, s.data+min(s.part, s.size-begin))
		if tooLarge(err) && begin == 0 && s.part > maxPart && s.size/maxPart < maxFiles {
			s.part = maxPart
			err = s.resize(f, s.data+s.part)
		}
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// The function unnamed creates a file without a name. The file disappears when it is
// closed.
func unnamed(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|unix.O_EXCL, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(temporary copy-on-write file)")), nil
	}
	// Some file systems do not support O_TMPFILE.
	f, err := os.CreateTemp(dir, "vddkcp-cow-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *store) resize(f *os.File, size int64) error {
	if s.sys.maxFile > 0 && size > s.sys.maxFile {
		return unix.EFBIG
	}
	return f.Truncate(size)
}

// tooLarge reports whether the error of a call of resize says that the file system
// does not support files of the requested size.
func tooLarge(err error) bool {
	return errors.Is(err, unix.EFBIG) || errors.Is(err, unix.EINVAL)
}

// The method place returns where the layer stores the byte at the given offset of the
// disk: in which file and at which position in this file. The result n is the number of
// bytes of the disk from this byte on that are stored in the same file.
func (s *store) place(off int64) (f *os.File, pos, n int64) {
	if len(s.files) == 1 {
		return s.files[0], s.data + off, s.size - off
	}
	begin := off - off%s.part
	return s.files[off/s.part], s.data + off - begin, min(begin+s.part, s.size) - off
}

func (s *store) read(p []byte, off int64) error {
	for len(p) > 0 {
		f, pos, have := s.place(off)
		n := min(int64(len(p)), have)
		if got, err := f.ReadAt(p[:n], pos); int64(got) < n {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read [%d, %d) from the layer %s: %w", off, off+n, s.name, err)
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (s *store) write(p []byte, off int64) error {
	for len(p) > 0 {
		f, pos, have := s.place(off)
		n := min(int64(len(p)), have)
		if _, err := s.sys.pwrite(f, p[:n], pos); err != nil {
			return cause(err)
		}
		p, off = p[n:], off+n
	}
	return nil
}

// The function cause returns the reason in err without the name of the file. The caller
// adds this name itself.
func cause(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// The method reserve allocates space for [off, off+n) of the disk, if the file system
// supports that.
func (s *store) reserve(off, n int64) error {
	return optional(s.allocate(unix.FALLOC_FL_KEEP_SIZE, off, n))
}

// reservePage allocates space for page i of the table, if the file system supports
// that.
func (s *store) reservePage(i int64) error {
	return optional(s.sys.fallocate(s.files[0], unix.FALLOC_FL_KEEP_SIZE, tableStart+i*pageSize, pageSize))
}

// The function optional returns nil if err says that the file system does not support a
// system call. It returns all other errors unchanged.
func optional(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// The method free deallocates the space of [off, off+n) of the disk. It ignores errors,
// because the content is correct even if the space stays allocated.
func (s *store) free(off, n int64) {
	_ = s.allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (s *store) allocate(mode uint32, off, n int64) error {
	for n > 0 {
		f, pos, have := s.place(off)
		m := min(n, have)
		if err := s.sys.fallocate(f, mode, pos, m); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// The method sync makes all writes durable, unless the layer is temporary.
func (s *store) sync() error {
	if s.temporary {
		return nil
	}
	for _, f := range s.files {
		if err := s.sys.fdatasync(f); err != nil {
			return fmt.Errorf("fdatasync: %w", err)
		}
	}
	return nil
}

func (s *store) close() error {
	var all error
	for _, f := range s.files {
		all = errors.Join(all, f.Close())
	}
	return all
}
