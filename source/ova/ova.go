// Package ova reads appliances in the Open Virtualization Format (DSP0243 of the DMTF).
// An appliance is a descriptor (an .ovf file) in one folder with the files of its
// disks, or a tar archive of all these files (an .ova file).
//
// [Open] opens an archive and [OpenDescriptor] a descriptor. Both return an [Appliance]
// with the list of its disks. [Appliance.OpenDisk] returns the raw bytes of the file of
// a disk without unpacking the archive. The formats of these files are not interpreted
// here. [Appliance.Verify] compares the files with the digests in the manifest.
//
// If the descriptor and the file of a disk contradict each other, the file is believed,
// and [Appliance.Warnings] reports this. But a file that is shorter than the descriptor
// says is an error.
package ova

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"sync"

	"golang.org/x/text/encoding"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// Disk is a disk that a descriptor lists.
type Disk struct {
	Number int    // 1 for the first disk of the descriptor, and so on
	ID     string // diskId; may be ""
	File   string // href, the name relative to the descriptor; "": the disk has no file and is empty
	System string // id of the virtual system that uses the disk; "": not recorded
	Format string // URI of the format, as it is written; may be ""
	// Capacity is the virtual size in bytes, or 0 if the descriptor does not record it.
	// Writers round it up to a multiple of Unit bytes.
	Capacity, Unit int64

	file file
	err  error // why the disk cannot be read
	odd  error // why the recorded capacity cannot be understood
}

// Name returns the diskId, or the name of the file if the disk has no diskId.
func (d *Disk) Name() string {
	if d.ID != "" {
		return d.ID
	}
	return d.File
}

// CompressionError reports a disk whose file is compressed as a whole. Such a file can
// be unpacked only from its start, not read at a given offset.
type CompressionError struct {
	Path, Disk, File, Method string
}

func (e *CompressionError) Error() string {
	return fmt.Sprintf("%s: disk %s: the file %s is compressed (ovf:compression=%s), which is not supported", e.Path, show(e.Disk), show(e.File), show(e.Method))
}

// Hint returns what the user can do about the error.
func (e *CompressionError) Hint() string {
	if e.Method == "gzip" {
		return "unpack the appliance, gunzip the disk, and open the unpacked disk"
	}
	return "unpack the appliance and the disk, and open the unpacked disk"
}

// Appliance is an open appliance. It is safe for concurrent use, except Close.
type Appliance struct {
	Disks []Disk

	path       string // of the .ova or .ovf file
	descriptor string // name of the descriptor, without its folder
	files      files
	encoding   encoding.Encoding // encoding of the descriptor; nil: UTF-8

	mu    sync.Mutex
	opens []string         // names of the files that were opened, except the descriptor
	notes map[int][]string // warnings from opening a disk, by its index
}

// Open opens the appliance in the tar archive f, which was opened under the given path.
// It reads only the headers of the archive and the descriptor. The Appliance takes over
// f. If Open returns an error, it has closed f. When ctx ends, the calls of the disks
// of the appliance fail.
func Open(ctx context.Context, path string, f source.Disk) (*Appliance, error) {
	a, err := open(ctx, path, f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return a, nil
}

func open(ctx context.Context, name string, f source.Disk) (*Appliance, error) {
	if f.Size() == 0 {
		return nil, fmt.Errorf("%s: the file is empty, want a tar archive", name)
	}
	if err := checkPacked(name, f); err != nil {
		return nil, err
	}
	members, err := readTar(ctx, name, f)
	if err != nil {
		return nil, err
	}
	t := &archive{ctx: ctx, path: name, f: f, members: members}
	found := t.named(".ovf")
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%s is no appliance: none of its %d files is an .ovf file", name, len(members))
	case 1:
	default:
		slices.Sort(found)
		return nil, fmt.Errorf("%s: the archive has two .ovf files, %s and %s, want one", name, show(found[0]), show(found[1]))
	}
	t.dir = path.Dir(found[0])
	descriptor, err := t.open(ctx, path.Base(found[0]))
	if err != nil {
		return nil, err
	}
	return read(name, path.Base(found[0]), descriptor, t)
}

// OpenDescriptor opens the appliance whose descriptor is f, an .ovf file that was
// opened under the given path. The function open opens the files of the disks:
// OpenDescriptor passes it their names in the descriptor, and the format "raw". The
// Appliance takes over f. If OpenDescriptor returns an error, it has closed f.
func OpenDescriptor(path string, f source.Disk, open source.Opener) (*Appliance, error) {
	a, err := read(path, filepath.Base(path), f, &folder{path: path, f: f, opens: open})
	if err != nil {
		f.Close()
		return nil, err
	}
	return a, nil
}

// The function read parses the descriptor of the appliance at the given path. The
// descriptor has the given name, and its bytes are in f.
func read(path, name string, f source.Disk, files files) (*Appliance, error) {
	if err := checkPacked(files.shown(name), f); err != nil {
		return nil, err
	}
	text, err := readAll(f, maxDescriptor)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", files.shown(name), err)
	}
	e, err := parseEnvelope(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", files.shown(name), err)
	}
	if len(e.disks) == 0 {
		return nil, fmt.Errorf("%s: the descriptor has no disk (Disk in a DiskSection)", files.shown(name))
	}
	a := &Appliance{path: path, descriptor: name, files: files, encoding: e.encoding}
	for i, d := range e.disks {
		a.Disks = append(a.Disks, a.newDisk(i+1, d, e))
	}
	return a, nil
}

// readAll returns the content of f. It returns an error if f has more than max bytes.
func readAll(f source.Disk, max int64) ([]byte, error) {
	if f.Size() > max {
		return nil, fmt.Errorf("the file has %d bytes, want at most %d", f.Size(), max)
	}
	text := make([]byte, f.Size())
	return text, image.ReadFull(f, text, 0)
}

// remote matches an href that is a URI with a scheme, such as http. A file with such an
// href is not in the appliance.
var remote = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]*://`)

// newDisk returns the disk that the element x of the descriptor describes. If the disk
// cannot be read, the field err of the returned Disk says why.
func (a *Appliance) newDisk(number int, x disk, e *envelope) Disk {
	d := Disk{
		Number: number, ID: x.id, System: e.systems[x.id], Format: x.format,
		Capacity: x.capacity, Unit: x.unit, odd: x.odd,
	}
	if x.fileRef != "" {
		d.file = e.files[x.fileRef]
		d.File = d.file.href
	}
	bad := func(format string, args ...any) {
		d.err = fmt.Errorf("%s: disk %s: %s", a.path, show(d.Name()), fmt.Sprintf(format, args...))
	}
	switch {
	case x.parent != "":
		bad("the disk has only the differences from the disk %s (ovf:parentRef), which is not supported", show(x.parent))
	case x.fileRef == "" && x.odd != nil:
		bad("the disk has no file, and its capacity cannot be read: %v", x.odd)
	case x.fileRef == "" && d.Capacity == 0:
		bad("the disk has no file, and its capacity is missing, 0, or a property such as ${size}: there is nothing to read")
	case x.fileRef == "":
	case d.File == "":
		bad("the element File %s of the descriptor has no href with the name of the disk's file", show(x.fileRef))
	case remote.MatchString(d.File):
		bad("the file of the disk is at %s: only files of the appliance are read; download the file first", show(d.File))
	case d.file.compression != "" && d.file.compression != "identity":
		d.err = &CompressionError{a.path, d.Name(), d.File, d.file.compression}
	}
	return d
}

// OpenDisk opens the file of Disks[i]. The returned disk has the raw bytes of the file,
// regardless of the format of the file. A disk without a file reads as zeros. The
// caller must close the returned disk before the appliance.
func (a *Appliance) OpenDisk(ctx context.Context, i int) (source.Disk, error) {
	d := &a.Disks[i]
	if d.err != nil {
		return nil, d.err
	}
	if d.File == "" {
		name := fmt.Sprintf("%s#%d", a.path, d.Number)
		return &empty{name: name, size: d.Capacity, id: fmt.Sprintf("empty:%d:%s", d.Capacity, name), life: life.Life{Context: ctx, Name: name}}, nil
	}
	f, err := a.openHref(ctx, i)
	if err != nil {
		return nil, fmt.Errorf("cannot open disk %s: %w", show(d.Name()), err)
	}
	if want := d.file.size; f.Size() < want {
		err := &ShortError{a.path, d.Name(), a.files.shown(d.File), "its File", f.Size(), want}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// ShortError reports a file that has fewer bytes than the descriptor says. The file is
// truncated, or the descriptor is wrong.
type ShortError struct {
	Path, Disk, File string
	By               string // the part of the descriptor that says so
	Have, Want       int64  // bytes
}

func (e *ShortError) Error() string {
	return fmt.Sprintf("%s: disk %s: %s has %d bytes, want %d according to %s in the descriptor: the file is truncated", e.Path, show(e.Disk), e.File, e.Have, e.Want, e.By)
}

// Hint returns what the user can do about the error.
func (e *ShortError) Hint() string {
	return "transfer the appliance again; if the file is complete and the descriptor is wrong, unpack the appliance and open the disk's file"
}

// CheckRaw checks the size in bytes of disk i, which is a raw disk. It returns a
// *ShortError if the disk is smaller than its capacity in the descriptor. A difference
// of less than the Unit of the disk is no error, because writers round the capacity up
// to a multiple of the Unit.
func (a *Appliance) CheckRaw(i int, size int64) error {
	d := &a.Disks[i]
	if d.Capacity > size && d.Capacity-size >= d.Unit {
		return &ShortError{a.path, d.Name(), a.files.shown(d.File), "its capacity", size, d.Capacity}
	}
	return nil
}

// openHref opens the file of disk i. The href in the descriptor is a URI reference, but
// not all writers escape special characters. Therefore openHref looks for a file with
// the name as it is in the descriptor, and for one with the unescaped name. If it finds
// neither, the file may have been split into chunks, and openHref looks for the first
// chunk.
func (a *Appliance) openHref(ctx context.Context, i int) (source.Disk, error) {
	d := &a.Disks[i]
	names := []string{d.File}
	if name, err := url.PathUnescape(d.File); err == nil && name != d.File {
		names = append(names, name)
	}
	if a.encoding != nil {
		// In the archive, the name of the file may be in the same character encoding
		// as the descriptor, and not in UTF-8.
		if name, err := a.encoding.NewEncoder().String(d.File); err == nil && name != d.File {
			names = append(names, name)
		}
	}
	var missing error
	for _, name := range names {
		f, err := a.openParts(ctx, name, d.file)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		if missing == nil {
			missing = err
		}
	}
	if d.file.chunkSize > 0 {
		return nil, missing
	}
	for _, name := range names {
		f, err := a.openOnlyChunk(ctx, i, name)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return nil, missing
}

// The names of the first two chunks of a file have these suffixes.
const (
	onlyChunk   = ".000000000"
	secondChunk = ".000000001"
)

// openOnlyChunk opens the file NAME.000000000 of disk i. It is called if there is no
// file NAME, and the descriptor does not say that the file is split into chunks.
func (a *Appliance) openOnlyChunk(ctx context.Context, i int, name string) (source.Disk, error) {
	first, second := name+onlyChunk, name+secondChunk
	f, err := a.openFile(ctx, first)
	if err != nil {
		return nil, err
	}
	if g, err := a.files.open(ctx, second); err == nil {
		err := fmt.Errorf("%s: no such file; its chunks %s and %s exist, but the descriptor has no ovf:chunkSize, which is needed to join them", a.files.shown(name), show(first), show(second))
		return nil, errors.Join(err, g.Close(), f.Close())
	}
	a.note(i, fmt.Sprintf("%s: the file %s of disk %s does not exist: %s is read instead", a.path, show(name), show(a.Disks[i].Name()), show(first)))
	return f, nil
}

// The method note adds a warning about disk i, unless the disk has this warning
// already.
func (a *Appliance) note(i int, warning string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.Contains(a.notes[i], warning) {
		return
	}
	if a.notes == nil {
		a.notes = map[int][]string{}
	}
	a.notes[i] = append(a.notes[i], warning)
}

// openParts opens the file that the element x of the descriptor describes. The file may
// be split into chunks. The given name is that of the file. The names of the chunks
// consist of this name and a number.
func (a *Appliance) openParts(ctx context.Context, name string, x file) (source.Disk, error) {
	if x.chunkSize == 0 {
		return a.openFile(ctx, name)
	}
	f, err := a.openChunks(ctx, name, x)
	if errors.Is(err, errNoChunk) {
		// Some writers record a chunk size although the file is not split.
		if f, err := a.openFile(ctx, name); err == nil {
			return f, nil
		}
	}
	return f, err
}

// openFile opens a file and records its name for Verify.
func (a *Appliance) openFile(ctx context.Context, name string) (source.Disk, error) {
	f, err := a.files.open(ctx, name)
	if err == nil {
		a.remember(name)
	}
	return f, err
}

func (a *Appliance) remember(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Contains(a.opens, name) {
		a.opens = append(a.opens, name)
	}
}

func (a *Appliance) openedFiles() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.opens)
}

// maxChunks is the largest number of chunks of one file.
const maxChunks = 4096

// errNoChunk means that not even the first chunk of a file exists.
var errNoChunk = errors.New("the first chunk of the file does not exist")

// openChunks opens a file that was split into the chunks NAME.000000000, NAME.000000001
// and so on. All chunks except the last have the same size (DSP0243 1.1, section 7.1).
// It returns an errNoChunk if the first chunk does not exist.
func (a *Appliance) openChunks(ctx context.Context, name string, x file) (_ source.Disk, err error) {
	n := int64(math.MaxInt64) // number of chunks; not known if the size of the file is not recorded
	if x.size > 0 {
		if n = (x.size-1)/x.chunkSize + 1; n > maxChunks {
			return nil, fmt.Errorf("%s has %d chunks, want at most %d", a.files.shown(name), n, maxChunks)
		}
	}
	var parts []part
	defer func() {
		if err != nil {
			for _, p := range parts {
				p.file.Close()
			}
		}
	}()
	last := int64(0) // size of the last chunk
	for i := int64(0); i < n; i++ {
		chunk := fmt.Sprintf("%s.%09d", name, i)
		if i > 0 && last < x.chunkSize && x.size == 0 {
			break
		}
		f, err := a.openFile(ctx, chunk)
		if errors.Is(err, fs.ErrNotExist) && i == 0 {
			return nil, fmt.Errorf("%w: %w", errNoChunk, err)
		}
		if errors.Is(err, fs.ErrNotExist) && x.size == 0 {
			break
		}
		if err != nil {
			return nil, err
		}
		parts = append(parts, part{file: f, size: f.Size(), owned: true})
		last = f.Size()
		want := x.chunkSize
		if i == n-1 {
			want = x.size - i*x.chunkSize
		}
		if last > want || last < want && x.size > 0 {
			return nil, fmt.Errorf("the chunk %s has %d bytes, want %d according to the descriptor", a.files.shown(chunk), last, want)
		}
		if int64(len(parts)) > maxChunks {
			return nil, fmt.Errorf("%s has more than %d chunks", a.files.shown(name), maxChunks)
		}
	}
	return newSection(ctx, a.files.shown(name), parts...), nil
}

// OpenFile opens the raw bytes of a file to which an image of the appliance refers. The
// caller passes the path of the image in the parameter from, relative to the folder of
// the descriptor (like Disk.File). The parameter name is the path by which the image
// refers to the file, relative to the folder of the image. OpenFile also returns the
// path of the file relative to the folder of the descriptor.
func (a *Appliance) OpenFile(ctx context.Context, from, name string) (f source.Disk, named string, err error) {
	named = path.Join(path.Dir(from), name)
	if path.IsAbs(name) {
		named = name
	}
	f, err = a.openFile(ctx, named)
	return f, named, err
}

// Size returns the size in bytes of the file of disk i. If the file is split, this is
// the size of all its chunks together. For a disk without a file it is 0. If the disk
// cannot be read, Size returns an error that says why.
func (a *Appliance) Size(ctx context.Context, i int) (int64, error) {
	if a.Disks[i].File == "" {
		return 0, a.Disks[i].err
	}
	f, err := a.OpenDisk(ctx, i)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Size(), nil
}

// Warnings returns sentences about mistakes in what the descriptor says about disk i.
// fileSize is the size of the file of the disk, and size is the virtual size of the
// disk, both in bytes.
func (a *Appliance) Warnings(i int, fileSize, size int64) []string {
	a.mu.Lock()
	all := slices.Clone(a.notes[i])
	a.mu.Unlock()
	d := &a.Disks[i]
	if d.odd != nil {
		all = append(all, fmt.Sprintf("%s: disk %s: %v: the capacity in the descriptor is ignored, and the disk has %d bytes", a.path, show(d.Name()), d.odd, size))
	}
	if d.File != "" && d.file.size > 0 && d.file.size != fileSize {
		all = append(all, fmt.Sprintf("%s: the descriptor says that the file %s has %d bytes, but the file has %d bytes", a.path, show(d.File), d.file.size, fileSize))
	}
	if d.Capacity > 0 && (size > d.Capacity || d.Capacity-size >= d.Unit) {
		all = append(all, fmt.Sprintf("%s: the descriptor says that disk %s has %d bytes (%s), but the disk has %d bytes: the size of the disk itself is used", a.path, show(d.Name()), d.Capacity, bytesize.Format(d.Capacity), size))
	}
	return all
}

// Close closes the archive or the descriptor. The caller must close all disks of the
// appliance before.
func (a *Appliance) Close() error { return a.files.Close() }
