package open

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// These constants limit a search for the parent of an image.
const (
	maxSearched = 64 << 10 // entries of one folder
	maxImages   = 4096     // files named *.vmdk in all folders together
)

// The type folder implements vmdk.Folder. If an image names its parent only by a UUID,
// the reader of VMDK images searches for the parent in such a folder. It has the files
// of the folder of the image and of the folders of --allow-path. It does not have the
// files of their subfolders.
type folder struct {
	o    *Opener
	f    *raw.Disk // the file of the image
	path string    // the path by which f was opened
}

// folderOf returns the folder of the image in f, which was opened under the given path.
// If the image is not a local file but lies in an archive, for example, folderOf
// returns nil.
func (o *Opener) folderOf(f source.Disk, path string) vmdk.Folder {
	if f, ok := f.(*raw.Disk); ok {
		return &folder{o, f, path}
	}
	return nil
}

// Names implements [vmdk.Folder]. It returns the names of the regular files that are
// named *.vmdk.
func (d *folder) Names(ctx context.Context) ([]string, error) {
	real, _, err := whereIs(d.f, d.path)
	if err != nil {
		return nil, err
	}
	own := filepath.Dir(real)
	names, err := imagesIn(ctx, own)
	if err != nil {
		return nil, err
	}
	searched := []string{own}
	for _, dir := range d.o.AllowPath {
		dir, err := filepath.Abs(dir)
		if err == nil {
			dir, err = filepath.EvalSymlinks(dir)
		}
		if err != nil || slices.Contains(searched, dir) {
			continue
		}
		searched = append(searched, dir)
		more, err := imagesIn(ctx, dir)
		if err != nil {
			return nil, err
		}
		for _, name := range more {
			names = append(names, filepath.Join(dir, name))
		}
	}
	if len(names) > maxImages {
		return nil, fmt.Errorf("cannot search %s: %d files are named *.vmdk, want at most %d", strings.Join(searched, " and "), len(names), maxImages)
	}
	return names, nil
}

// imagesIn returns the names of the regular files in dir that are named *.vmdk, in
// alphabetical order. It follows symbolic links.
func imagesIn(ctx context.Context, dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var names []string
	for n := 0; ; {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		entries, err := f.ReadDir(1 << 10)
		if err != nil && err != io.EOF {
			return nil, err
		}
		if n += len(entries); n > maxSearched {
			return nil, fmt.Errorf("cannot search %s: the folder has more than %d files", dir, maxSearched)
		}
		for _, e := range entries {
			if !strings.EqualFold(filepath.Ext(e.Name()), ".vmdk") {
				continue
			}
			if fi, err := os.Stat(filepath.Join(dir, e.Name())); err == nil && !fi.Mode().IsRegular() {
				continue
			}
			names = append(names, e.Name())
		}
		if err == io.EOF {
			slices.Sort(names)
			return names, nil
		}
	}
}

// Peek implements [vmdk.Folder].
func (d *folder) Peek(ctx context.Context, name string) (source.Disk, error) {
	real, _, err := whereIs(d.f, d.path)
	if err != nil {
		return nil, err
	}
	f, _, _, err := d.o.openNamed(ctx, filepath.Dir(real), d.path, name)
	if err != nil {
		return nil, err
	}
	return f, nil
}
