package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/usage"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// The type outputs contains the files that a command writes in addition to its target:
// reports, logs, statistics, journals. An output must not be a file that the command reads
// or copies to, not even under another name. All outputs are checked before the first one
// is opened.
type outputs struct {
	list      []outputFile
	protected []protected
	folder    string // that the command creates before it writes outputs; "": none
}

// outputFile is a file that the value of a flag names. The field own is true for a file that only
// vddkcp writes. The method outputs.check does not look at the content of such a file, because the
// code that opens the file does so. The field later is true for a file whose folder may be missing
// when outputs.check is called.
type outputFile struct {
	flag, path string
	own, later bool
}

// The type protected is a file that no output may overwrite. Its field what describes the
// file in messages.
type protected struct{ what, path string }

// The method add adds the file that a flag names, if the flag is given.
func (o *outputs) add(flag, path string) {
	if path != "" {
		o.list = append(o.list, outputFile{flag: flag, path: path})
	}
}

// addOwn is like add, for a file that only vddkcp writes: a journal or a state
// file.
func (o *outputs) addOwn(flag, path string) {
	if path != "" {
		o.list = append(o.list, outputFile{flag: flag, path: path, own: true})
	}
}

// addLog is like add, for a file in a folder that the command creates.
func (o *outputs) addLog(flag, path string) {
	o.list = append(o.list, outputFile{flag: flag, path: path, later: true})
}

// addLater is like addOwn, for a file whose folder need not exist yet.
func (o *outputs) addLater(flag, path string) {
	if path != "" {
		o.list = append(o.list, outputFile{flag: flag, path: path, own: true, later: true})
	}
}

// The method protect adds a local file to the files that no output may overwrite, because
// the command needs them.
func (o *outputs) protect(what, path string) {
	if path != "" {
		o.protected = append(o.protected, protected{what, path})
	}
}

// The function absolute returns the absolute path of a file, as far as it is known.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return filepath.Clean(path)
}

// addressOrPath parses the address of a file that outputs must not overwrite. It returns
// an invalid address as a path. The command then fails because of the address, but it still
// writes a report of the failure. The report must not overwrite a file at this path.
func addressOrPath(text string, role address.Role) address.Address {
	if a, err := address.Parse(text, role); err == nil {
		return a
	}
	return address.Path(text)
}

// protectSource protects the file that the address of a source names.
func (o *outputs) protectSource(what string, a address.Address) {
	if _, ok := a.(address.Stream); ok {
		o.protect(what+", standard input", standardInput)
	} else if path, ok := sourceopen.FileOf(a); ok {
		o.protect(what, path)
	}
}

// protectTarget protects the files that the address of a target names.
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

// protectSecret protects the file that contains a password or a cookie.
func (o *outputs) protectSecret(what string, s secretFlag) {
	if s.form == inFile {
		o.protect("the file of "+what, s.value)
	}
}

// protectProfile protects the configuration file that has the given profile, and the files
// that contain its secrets. p may be nil.
func (o *outputs) protectProfile(p *profile.Profile) {
	if p != nil {
		o.protect("the configuration file of vddkcp", p.File)
		o.protect("the file of the password", p.Password.File)
		o.protect("the file of the cookie", p.Cookie.File)
	}
}

// withFile returns a new list of outputs: the outputs of o, followed by the file at the
// given path. flag is the name of the command line flag that sets the path. If the path is
// empty, no file is added.
func (o *outputs) withFile(flag, path string) *outputs {
	more := &outputs{list: slices.Clip(o.list), folder: o.folder}
	more.add(flag, path)
	return more
}

// The method check returns an *outputError in three cases: an output is a protected file,
// an output is the same file as another output, or an output is an existing file that
// cannot be a report, a log or another text. It returns another usage error if the folder of an
// output does not exist. It opens nothing for writing.
func (o *outputs) check() error {
	places := newPlaces()
	for _, out := range o.list {
		// Two outputs must not be the same file. But they may be the same open descriptor,
		// such as a terminal or a pipe. Therefore a descriptor is not compared with the
		// other outputs.
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
	for _, out := range o.list {
		if err := o.checkFolderOf(out); err != nil {
			return err
		}
	}
	return nil
}

// checkFolderOf checks that the folder of an output exists or will exist.
func (o *outputs) checkFolderOf(out outputFile) error {
	if _, ok := descriptor(out.path); ok || out.later {
		return nil
	}
	if o.folder != "" && absolute(o.folder) == absolute(filepath.Dir(out.path)) {
		return nil
	}
	return checkFolder(out.flag, out.path)
}

// checkOpened returns an *outputError if an output is a file that one of the given Openers
// has opened, for example a part of an image or a parent image. If the receiver o is nil,
// there are no outputs, and the result is nil.
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

// outputError reports an output that would overwrite a file which the command
// needs. Its exit status is 2.
type outputError struct {
	error // a *usage.Error
	path  string
}

func (e *outputError) Unwrap() error { return e.error }

func refused(out outputFile, what string) error {
	message := fmt.Sprintf("%s %s: the output would overwrite %s", out.flag, out.path, what)
	return &outputError{usage.New(message, "name another file"), out.path}
}

// The type places contains the outputs of a command. Its method find returns the output
// that is the same file as the file at a given path. It finds this output even if neither
// of them has been created yet.
type places struct {
	files   map[fileID]outputFile
	paths   map[string]outputFile // by path with links resolved, for files that do not exist
	names   map[string]bool       // the last elements of paths
	numbers map[int]outputFile    // by file descriptor of this process
}

// fileID identifies a file or a block device.
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
		return outputFile{}, false // resolving a path takes time, and there may be many paths
	}
	out, found := p.paths[resolved(path)]
	return out, found
}

// idOf returns the identity of the file at the given path. exists is false if there is no
// such file. ok is false for terminals, sockets and other character devices, which several
// outputs may share.
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

// The function descriptor returns the number of the file descriptor of this process that
// the given path stands for, such as 3 for /dev/fd/3. It recognizes the paths that
// durable.Descriptor recognizes, and /dev/stdin. The result ok is false for other paths.
func descriptor(path string) (fd int, ok bool) {
	if path == standardInput {
		return 0, true
	}
	return durable.Descriptor(path)
}

const standardInput = "/dev/stdin"

// The function resolved returns the absolute path of the file that writing to the given
// path would create. It resolves symbolic links for this.
func resolved(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	if place := sinkopen.PlaceOf(address.Path(path)); place.Kind == "file" {
		return place.Path()
	}
	return filepath.Clean(path)
}

// notText describes an existing file that cannot be a report, a log or another text. It
// returns "" for other files. It also returns "" for a file that cannot be opened,
// because writing to that file will report the error.
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
		return "a file that is not a text file"
	}
	return ""
}

// checkFolder returns a usage error if the folder of an output does not exist, if the output itself
// is a folder, or if no new file can be created in the folder. The path may be "". The check finds
// a mistake before work is begun that would be lost, and does not create the output.
func checkFolder(flag, path string) error {
	if path == "" {
		return nil
	}
	const hint = "create the folder, or name a file in another one"
	folder := filepath.Dir(path)
	info, err := os.Stat(folder)
	switch {
	case err != nil:
		return usage.WithHint(fmt.Errorf("%s: cannot create %s: %w", flag, printable.Name(path), err), hint)
	case !info.IsDir():
		return usage.New(fmt.Sprintf("%s: cannot create %s, because %s is not a folder", flag, printable.Name(path), printable.Name(folder)), hint)
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return usage.New(fmt.Sprintf("%s: %s is a folder, want a file", flag, printable.Name(path)), "name a file in the folder")
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if err := unix.Faccessat(unix.AT_FDCWD, folder, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
			return usage.New(fmt.Sprintf("%s: cannot create %s: the folder %s: %v", flag, printable.Name(path), printable.Name(folder), err), "change the permissions of the folder, or name a file in another one")
		}
	}
	return nil
}
