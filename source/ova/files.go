package ova

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strings"

	"github.com/vddkcp/vddkcp/source"
)

// files gives access to the files of an appliance, which are in an archive or in a
// folder. Names are relative to the folder of the descriptor. If a file does not exist,
// the error wraps fs.ErrNotExist. All methods except Close are safe for concurrent use.
type files interface {
	// The method open returns the raw bytes of a file.
	open(ctx context.Context, name string) (source.Disk, error)
	// The method manifest returns the raw bytes of the manifest, and the path that
	// messages show for it. The caller passes the name that the manifest should have.
	manifest(ctx context.Context, name string) (f source.Disk, shown string, err error)
	// The method shown returns the path that messages show for the file with the given
	// name.
	shown(name string) string
	Close() error
}

// archive gives access to the files in a tar archive.
type archive struct {
	ctx     context.Context // of the files that are opened
	path    string          // of the archive
	f       source.Disk     // the archive
	members map[string]member
	dir     string // folder of the descriptor in the archive
}

func (t *archive) shown(name string) string {
	return fmt.Sprintf("%s(%s)", t.path, path.Join(t.dir, name))
}

func (t *archive) open(_ context.Context, name string) (source.Disk, error) {
	m, ok := t.members[path.Join(t.dir, name)]
	if !ok || path.IsAbs(name) {
		return nil, &missingError{t.path, name}
	}
	return newSection(t.ctx, t.shown(name), part{file: t.f, off: m.off, size: m.size}), nil
}

func (t *archive) manifest(ctx context.Context, name string) (source.Disk, string, error) {
	if _, ok := t.members[path.Join(t.dir, name)]; !ok {
		found := t.named(".mf")
		if len(found) != 1 || path.Dir(found[0]) != t.dir {
			return nil, "", fs.ErrNotExist
		}
		name = path.Base(found[0])
	}
	f, err := t.open(ctx, name)
	return f, t.shown(name), err
}

// The method named returns the names of the members that have the given extension, in
// upper or lower case. It leaves out names that begin with "._". macOS adds members
// with such names to an archive, to store those attributes of files that only macOS
// has.
func (t *archive) named(ext string) []string {
	var names []string
	for name := range t.members {
		if strings.EqualFold(path.Ext(name), ext) && !strings.HasPrefix(path.Base(name), "._") {
			names = append(names, name)
		}
	}
	return names
}

// missingError reports a file that does not exist in an archive.
type missingError struct{ archive, name string }

func (e *missingError) Error() string {
	return fmt.Sprintf("%s has no file %s", e.archive, show(e.name))
}

func (e *missingError) Unwrap() error { return fs.ErrNotExist }

func (t *archive) Close() error { return t.f.Close() }

// folder gives access to the files in the folder of a descriptor.
type folder struct {
	path  string        // of the descriptor
	f     source.Disk   // the descriptor
	opens source.Opener // opens the other files
}

func (d *folder) shown(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(d.path), name)
}

func (d *folder) open(ctx context.Context, name string) (source.Disk, error) {
	return d.opens(ctx, d.path, name, "raw")
}

func (d *folder) manifest(ctx context.Context, name string) (source.Disk, string, error) {
	f, err := d.open(ctx, name)
	return f, d.shown(name), err
}

func (d *folder) Close() error { return d.f.Close() }
