package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
)

// Pin is a file that says which disk an export serves, and in which state. A later export
// with the same file serves only the same disk in the same state. A client that has read a
// part of the disk from the first export can therefore read the rest from the second one.
type Pin struct {
	path    string
	lock    *os.File
	earlier *pinned // what an earlier export has written; nil: there was none
	agrees  bool    // the file says which disk this export serves
}

// The type pinned is the content of the file.
type pinned struct {
	Version int    `json:"version"`
	Size    int64  `json:"size"`  // of the disk, in bytes
	Disk    string `json:"disk"`  // identity of the disk, see source.Identified
	Proof   string `json:"proof"` // what proves that the content is unchanged: snapshot, mtime or none
}

// pinFormat says which versions of the format this package reads.
var pinFormat = fileversion.Format{
	Name: "file of --pin", Oldest: 1, Newest: 1,
	Otherwise: "name another file, or remove this one to serve the disk as it is now",
}

// OpenPin locks the file at path against other exports, and reads what an earlier export
// has written to it. The file need not exist. The caller closes the result.
func OpenPin(path string) (*Pin, error) {
	lock, err := durable.Lock(path + ".lock")
	if err != nil {
		return nil, fmt.Errorf("--pin: %w", err)
	}
	p := &Pin{path: path, lock: lock}
	if err := p.read(); err != nil {
		return nil, errors.Join(fmt.Errorf("--pin %s: %w", printable.Name(path), err), p.Close())
	}
	return p, nil
}

func (p *Pin) read() error {
	text, err := durable.ReadFile(p.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := pinFormat.CheckJSON(text); err != nil {
		return err
	}
	var earlier pinned
	if err := json.Unmarshal(text, &earlier); err != nil {
		return usage.New(fmt.Sprintf("the file was not written by --pin: %v", err), pinFormat.Otherwise)
	}
	if err := pinFormat.Check(int64(earlier.Version)); err != nil {
		return err
	}
	p.earlier = &earlier
	return nil
}

// Earlier returns the identity of the disk that an earlier export has served, or "" if
// there was none.
func (p *Pin) Earlier() string {
	if p.earlier == nil {
		return ""
	}
	return p.earlier.Disk
}

// Agrees reports whether the file says which disk this export serves, and in which state.
func (p *Pin) Agrees() bool { return p.agrees }

// Exists reports whether the file exists. If the user has removed it, no later export will follow.
func (p *Pin) Exists() bool {
	_, err := os.Lstat(p.path)
	return !errors.Is(err, fs.ErrNotExist)
}

// Close releases the lock.
func (p *Pin) Close() error {
	return errors.Join(os.Remove(p.lock.Name()), durable.CloseLocked(p.lock))
}

// The method check compares the disk with the one that an earlier export has served. If
// there was none, the method writes the file.
func (p *Pin) check(ctx context.Context, disk source.Disk, log *slog.Logger) error {
	is := pinned{Version: pinFormat.Newest, Size: disk.Size(), Proof: "none"}
	if i, ok := source.Ability[source.Identified](disk); ok {
		var err error
		if is.Disk, is.Proof, err = i.Identity(ctx); err != nil {
			return fmt.Errorf("--pin: %w", err)
		}
	}
	if was := p.earlier; was != nil {
		if *was != is {
			return usage.New(fmt.Sprintf("--pin %s: an earlier export has served another disk, or the disk has changed since then: the disk was %s of %d bytes, and is %s of %d bytes now",
				printable.Name(p.path), printable.Name(was.Disk), was.Size, printable.Name(is.Disk), is.Size),
				"clients that continue would mix the content of both: let them start over, after removing "+printable.Name(p.path))
		}
		if is.Proof == "none" {
			log.Warn("an earlier export has served this disk, but nothing proves that the disk is unchanged since then", "disk", is.Disk)
		}
		p.agrees = true
		return nil
	}
	text, err := json.Marshal(is)
	if err == nil {
		err = durable.Replace(p.path, append(text, '\n'), durable.Private)
	}
	if err != nil {
		return fmt.Errorf("--pin %s: %w", printable.Name(p.path), err)
	}
	p.agrees = true
	return nil
}
