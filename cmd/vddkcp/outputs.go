package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/durable"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// outputs are the files that a command writes besides its target: reports, logs,
// statistics, journals. None of them may be a file that the command reads or
// copies to, under whatever name. They are checked before one is opened.
type outputs struct {
	list      []outputFile
	protected []protected
}

// outputFile is a file that a flag names. Own says that its content is checked where
// it is opened, as that of a file of vddkcp's own.
type outputFile struct {
	flag, path string
	own        bool
}

// protected is a file that no output may be, and what it is to the command.
type protected struct{ what, path string }

// add adds the file of a flag, if the flag is given.
func (o *outputs) add(flag, path string) {
	if path != "" {
		o.list = append(o.list, outputFile{flag: flag, path: path})
	}
}

// addOwn is add for a file that only vddkcp writes: a journal, a state file.
func (o *outputs) addOwn(flag, path string) {
	if path != "" {
		o.list = append(o.list, outputFile{flag: flag, path: path, own: true})
	}
}

// protect adds a local file that the command needs.
func (o *outputs) protect(what, path string) {
	if path != "" {
		o.protected = append(o.protected, protected{what, path})
	}
}

// protectSource adds the files that the address of a source names.
func (o *outputs) protectSource(what string, a address.Address) {
	if _, ok := a.(address.Stream); ok {
		o.protect(what+", standard input", standardInput)
	} else if path, ok := sourceopen.FileOf(a); ok {
		o.protect(what, path)
	}
}

// protectTarget adds the files that the address of a target names.
func (o *outputs) protectTarget(what string, a address.Address) {
	if _, ok := a.(address.Stream); ok {
		o.protect(what+", standard output", "-")
		return
	}
	switch place := sinkopen.PlaceOf(a); place.Kind {
	case "file":
		o.protect(what, place.Path())
		o.protect("the unfinished copy of "+what, place.Partial)
		o.protect("the journal of "+what, journal.Beside(place.Partial))
	case "block device", "stream":
		o.protect(what, a.String())
	}
}

// protectSecret adds the file that a password or a cookie is in.
func (o *outputs) protectSecret(what string, s secretFlag) {
	if s.form == inFile {
		o.protect("the file of "+what, s.value)
	}
}

// with returns the outputs and one more, if the flag is given.
func (o *outputs) with(flag, path string) *outputs {
	more := &outputs{list: slices.Clip(o.list)}
	more.add(flag, path)
	return more
}

// check returns an *outputError if an output is a protected file, another output,
// or holds what no output of vddkcp is. It opens nothing for writing.
func (o *outputs) check() error {
	places := newPlaces()
	for _, out := range o.list {
		// Several outputs may share a terminal or a pipe.
		if _, shared := descriptor(out.path); !shared {
			if other, ok := places.find(out.path); ok {
				return refused(out, "the file of "+other.flag)
			}
		}
		places.put(out)
	}
	for _, p := range o.protected {
		if out, ok := places.find(p.path); ok {
			return refused(out, p.what)
		}
	}
	for _, out := range o.list {
		if out.own {
			continue
		}
		if what := notText(out.path); what != "" {
			return refused(out, what)
		}
	}
	return nil
}

// checkOpened returns an *outputError if an output is a file that an opener has
// opened: a part of an image, a parent. There may be no outputs.
func (o *outputs) checkOpened(openers ...*sourceopen.Opener) error {
	if o == nil {
		return nil
	}
	for _, out := range o.list {
		info, err := os.Stat(out.path)
		if err != nil {
			continue
		}
		for _, opener := range openers {
			if path, ok := opener.Uses(info); ok {
				return refused(out, "a file that is read, "+path)
			}
		}
	}
	return nil
}

// outputError is an output that would overwrite what the command needs, with exit
// status 2.
type outputError struct {
	usageError
	path string
}

func (e *outputError) Unwrap() error { return &e.usageError }

func refused(out outputFile, what string) error {
	err := fmt.Errorf("%s %s: this is %s, which it would overwrite", out.flag, out.path, what)
	return &outputError{usageError{err, "name another file"}, out.path}
}

// places finds outputs by the file that a path leads to, or would lead to.
type places struct {
	files   map[fileID]outputFile
	paths   map[string]outputFile // of files that do not exist, links resolved
	names   map[string]bool       // last elements of paths
	numbers map[int]outputFile    // of descriptors of this process
}

// fileID tells a file or a block device from all others.
type fileID struct {
	device bool
	dev    uint64
	ino    uint64
}

func newPlaces() *places {
	return &places{map[fileID]outputFile{}, map[string]outputFile{}, map[string]bool{}, map[int]outputFile{}}
}

func (p *places) put(out outputFile) {
	if fd, ok := durable.Descriptor(out.path); ok {
		p.numbers[fd] = out
	}
	if id, exists, ok := idOf(out.path); exists {
		if ok {
			p.files[id] = out
		}
		return
	}
	path := resolved(out.path)
	p.paths[path], p.names[filepath.Base(path)] = out, true
}

func (p *places) find(path string) (outputFile, bool) {
	if fd, ok := descriptor(path); ok {
		if out, ok := p.numbers[fd]; ok && fd != 2 {
			return out, true
		}
	}
	id, exists, ok := idOf(path)
	if exists {
		out, found := p.files[id]
		return out, ok && found
	}
	if out, ok := p.paths[filepath.Clean(path)]; ok {
		return out, true
	}
	if !p.names[filepath.Base(path)] {
		return outputFile{}, false // to resolve a path takes time, and there may be many
	}
	out, found := p.paths[resolved(path)]
	return out, found
}

// idOf returns what tells the file at path apart. It is not ok for what may be
// several things at once: a terminal, a socket, /dev/null.
func idOf(path string) (id fileID, exists, ok bool) {
	var st unix.Stat_t
	var err error
	if fd, ok := descriptor(path); ok {
		err = unix.Fstat(fd, &st)
	} else {
		err = unix.Stat(path, &st)
	}
	if err != nil {
		return id, false, false
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		return fileID{device: true, dev: uint64(st.Rdev)}, true, true
	case unix.S_IFREG, unix.S_IFIFO:
		return fileID{dev: uint64(st.Dev), ino: st.Ino}, true, true
	}
	return id, true, false
}

// descriptor is durable.Descriptor, and knows standard input too.
func descriptor(path string) (fd int, ok bool) {
	if path == standardInput {
		return 0, true
	}
	return durable.Descriptor(path)
}

const standardInput = "/dev/stdin"

// resolved is the absolute path that a file would have that is created at path.
func resolved(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	if place := sinkopen.PlaceOf(address.Path(path)); place.Kind == "file" {
		return place.Path()
	}
	return filepath.Clean(path)
}

// notText says what an existing file is if it cannot be a report, a log or another
// text, "" for one that can. What can't be opened is reported when it is written.
func notText(path string) string {
	if _, ok := durable.Descriptor(path); ok {
		return ""
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return ""
	case info.Mode().Type() == os.ModeDevice:
		return "a block device"
	case !info.Mode().IsRegular():
		return ""
	}
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 4096)
	n, _ := io.ReadFull(f, head)
	switch head = head[:n]; {
	case sourceopen.IsImage(head):
		return "an image of a disk"
	case bytes.IndexByte(head, 0) >= 0:
		return "a file that holds no text"
	}
	return ""
}

// isPage reports whether a report is to be a page for people.
func isPage(path string) bool { return strings.EqualFold(filepath.Ext(path), ".html") }
