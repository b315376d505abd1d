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

// Bounds of a search for the parent of an image.
const (
	maxSearched = 64 << 10 // entries of one folder
	maxImages   = 4096     // files named *.vmdk, of all folders
)

// folder is where the parent of an image may be that is known by its UUID alone:
// the image's own folder, and those of --allow-path, but not the folders below
// these.
type folder struct {
	o    *Opener
	f    *raw.Disk // of the image
	path string    // as which it was opened
}

// folderOf returns the folder of the image in f, nil for an image that lies in
// no folder of its own, as in an archive.
func (o *Opener) folderOf(f source.Disk, path string) vmdk.Folder {
	if f, ok := f.(*raw.Disk); ok {
		return &folder{o, f, path}
	}
	return nil
}

// Names implements vmdk.Folder: regular files that are named *.vmdk.
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
		return nil, fmt.Errorf("%s has %d files named *.vmdk, want at most %d to search", strings.Join(searched, " and "), len(names), maxImages)
	}
	return names, nil
}

// imagesIn returns the regular files in dir, and links to such, that are named
// *.vmdk, in alphabetical order.
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
			return nil, fmt.Errorf("%s has more than %d files, too many to search", dir, maxSearched)
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

// Peek implements vmdk.Folder.
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
