package vspheretest

import (
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
)

// makeImage makes the image of a new disk and returns the size of the disk.
func (s *Server) makeImage(n *node, v VM, i int, d Disk) (int64, error) {
	size := d.Size
	if size == 0 {
		size = 1 << 20
		if d.Image != "" {
			f, err := os.Open(d.Image)
			if err != nil {
				return 0, err
			}
			defer f.Close()
			if size, err = f.Seek(0, io.SeekEnd); err != nil { // the size of a block device too
				return 0, err
			}
		} else if len(d.Content) > 0 {
			size = (int64(len(d.Content)) + 511) &^ 511
		}
	}
	if s.options.Dir == "" {
		return size, nil
	}
	if d.Image != "" {
		path, err := filepath.Abs(d.Image)
		n.image = path
		return size, err
	}
	n.image = filepath.Join(s.options.Dir, fmt.Sprintf("%s-%d.raw", filepath.Base(n.path), s.newImage()))
	f, err := os.Create(n.image)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return 0, err
	}
	switch {
	case d.Content != nil:
		_, err = f.WriteAt(d.Content, 0)
	case !d.Zero:
		err = fill(f, size, fmt.Sprintf("%s/%s/%s/%d", v.Datacenter, v.Folder, v.Name, i))
	}
	return size, err
}

func (s *Server) newImage() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images++
	return s.images
}

// fill writes data that depends on seed alone into a file of holes: about half of the pieces of
// 64 KiB, and always the first and the last one.
func fill(f *os.File, size int64, seed string) error {
	h := fnv.New64a()
	h.Write([]byte(seed))
	const piece = 64 << 10
	r := rand.New(rand.NewPCG(h.Sum64(), 0))
	buf := make([]byte, piece)
	for off := int64(0); off < size; off += piece {
		if r.Uint32()%2 == 0 && off > 0 && off+piece < size {
			continue
		}
		for i := 0; i < piece; i += 8 {
			w := r.Uint64()
			for j := range 8 {
				buf[i+j] = byte(w >> (8 * j))
			}
		}
		if _, err := f.WriteAt(buf[:min(piece, size-off)], off); err != nil {
			return err
		}
	}
	return nil
}

func imageSize(path string) int64 {
	if path == "" {
		return 0
	}
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// diskPath returns the path at which the stand-in library looks for a disk. It divides the name at
// the first "]", as the library does, whatever the name of the datastore.
func (s *Server) diskPath(n *node) string {
	store, rest, _ := strings.Cut(strings.TrimPrefix(n.name(), "["), "]")
	return s.options.LibDir + "/disks/" + store + "/" + strings.TrimPrefix(rest, " ")
}

// link makes the stand-in library serve the images of a VM's files, and nothing else of the VM.
func (s *Server) link(m *machine) error {
	if s.options.LibDir == "" {
		return nil
	}
	want := map[string]string{}
	for _, n := range m.nodes() {
		if n.image != "" {
			want[s.diskPath(n)] = n.image
		}
	}
	for at, image := range want {
		if m.links[at] == image {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(image, at+".new"); err != nil {
			return err
		}
		if err := os.Rename(at+".new", at); err != nil {
			return err
		}
	}
	for at := range m.links {
		if want[at] == "" {
			if err := os.Remove(at); err != nil {
				return err
			}
		}
	}
	m.links = want
	return nil
}

// own gives n an image of its own if another file of its disk has the same one.
func (s *Server) own(m *machine, n *node) error {
	shared := false
	for _, other := range m.nodes() {
		shared = shared || other != n && other.image == n.image
	}
	if n.image == "" || !shared {
		return nil
	}
	from, err := os.Open(n.image)
	if err != nil {
		return err
	}
	defer from.Close()
	image := filepath.Join(s.options.Dir, fmt.Sprintf("%s-%d.raw", filepath.Base(n.path), s.newImage()))
	to, err := os.Create(image)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := copySparse(to, from); err != nil {
		return err
	}
	n.image = image
	return s.link(m)
}

// copySparse copies an image and leaves holes where it has zeros.
func copySparse(to, from *os.File) error {
	buf := make([]byte, 64<<10)
	var off int64
	for {
		n, err := io.ReadFull(from, buf)
		if strings.Trim(string(buf[:n]), "\x00") != "" {
			if _, err := to.WriteAt(buf[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return to.Truncate(off)
		}
		if err != nil {
			return err
		}
	}
}
