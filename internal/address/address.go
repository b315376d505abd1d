// Package address parses the addresses of disks: what a user writes for SRC, DST
// or --backing. [Parse] is called once for each address; after that the program
// passes an [Address] around and switches on its type.
package address

import (
	"path/filepath"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
)

// Address is the parsed address of a disk. Its type is one of [Path], [Appliance],
// [Datastore], [VDDK], [NBD], [Stream] and [Null].
type Address interface {
	// String returns the address as the user wrote it.
	String() string
	isAddress()
}

// Path is the path of a local file, block device, FIFO or character device.
type Path string

// Appliance is a disk of an appliance (an .ova or .ovf file): PATH, PATH#NUMBER or
// PATH#NAME. Only sources are appliances.
type Appliance struct {
	Path   string // of the .ova or .ovf file
	Choice string // the number or the name of the disk; "": the address names none
	text   string
}

// Datastore is a disk on a VMware host, which VDDK opens: "[STORE] PATH". The name
// of a datastore may contain brackets.
type Datastore struct{ Store, Path string }

// VDDK is a disk that VDDK opens by a path of any kind: vddk:PATH. Path may be
// empty: nbdkit's words can leave the file out, and the error for that comes with
// the other parameters of VDDK that are missing.
type VDDK struct{ Path string }

// NBD is an export of an NBD server.
type NBD struct{ URI *nbd.URI }

// Stream is standard input or standard output: "-".
type Stream struct{}

// Null is the target that drops all data: "null:".
type Null struct{}

func (a Path) String() string      { return string(a) }
func (a Datastore) String() string { return "[" + a.Store + "] " + a.Path }
func (a VDDK) String() string      { return vddkPrefix + a.Path }
func (a NBD) String() string       { return a.URI.String() }
func (Stream) String() string      { return stream }
func (Null) String() string        { return null }

func (a Appliance) String() string {
	if a.text == "" && a.Choice != "" {
		return a.Path + "#" + a.Choice
	}
	if a.text == "" {
		return a.Path
	}
	return a.text
}

// IsWhole reports whether the address names the appliance without a disk of it:
// PATH, without # after it.
func (a Appliance) IsWhole() bool { return a.String() == a.Path }

func (Path) isAddress()      {}
func (Appliance) isAddress() {}
func (Datastore) isAddress() {}
func (VDDK) isAddress()      {}
func (NBD) isAddress()       {}
func (Stream) isAddress()    {}
func (Null) isAddress()      {}

// Role is what a command does with the disk at an address.
type Role int

// The roles of a disk.
const (
	Disk   Role = iota // it is read at any offset, or served
	Source             // it is copied: standard input is a Source too
	Target             // it is written
)

const (
	stream     = "-"
	null       = "null:"
	vddkPrefix = "vddk:"
)

var (
	// datastore is "[DATASTORE] DIR/DISK.vmdk".
	datastore = regexp.MustCompile(`(?s)^\[(.+?)\] (.+)$`)
	// keyValue is a parameter of nbdkit-vddk-plugin, as its command line has it.
	keyValue = regexp.MustCompile(`^([A-Za-z][A-Za-z0-9._-]*)=`)
)

// Parse parses an address for a role. It reads no file and asks no server, so a
// Path may lead nowhere. An address that the role does not allow is a
// *[usage.Error], and so is one that only another program understands; it would be
// taken for the name of a file otherwise. The user names such a file by ./ before
// its name.
func Parse(text string, role Role) (Address, error) {
	if role == Target {
		return parseTarget(text)
	}
	return parseSource(text, role)
}

func parseSource(text string, role Role) (Address, error) {
	if a, err := parseAny(text); a != nil || err != nil {
		return a, err
	}
	if err := foreign(text, role); err != nil {
		return nil, err
	}
	if text == "" {
		return nil, usage.Errorf("the source is empty: want a path")
	}
	if text == stream && role == Source {
		return Stream{}, nil
	}
	if text == stream {
		return nil, usage.Errorf("standard input is a stream, not a disk; a file of that name is ./-")
	}
	if m := keyValue.FindStringSubmatch(text); m != nil {
		// Not the value, which may be a password.
		return nil, usage.Errorf("%s=, a parameter of nbdkit-vddk-plugin, is no address (a file of that name is ./%[1]s=...)", m[1])
	}
	if a, ok := parseAppliance(text); ok {
		return a, nil
	}
	return Path(text), nil
}

func parseTarget(text string) (Address, error) {
	switch text {
	case "":
		return nil, usage.Errorf("the target is empty: want a path, - or null:")
	case stream:
		return Stream{}, nil
	case null:
		return Null{}, nil
	}
	a, err := parseAny(text)
	if err != nil {
		return nil, err
	}
	if _, ok := VDDKFile(a); ok {
		return nil, usage.Errorf("%s: disks of VMware's are read, not written (a file of that name is ./%[1]s)", text)
	}
	if a != nil {
		return a, nil
	}
	if err := foreign(text, Target); err != nil {
		return nil, err
	}
	return Path(text), nil
}

// parseAny parses the addresses that mean the same in every role. It returns nil
// for other addresses.
func parseAny(text string) (Address, error) {
	if nbd.IsURI(text) {
		uri, err := nbd.ParseURI(text)
		if err != nil {
			return nil, usage.Errorf("%v", err)
		}
		return NBD{uri}, nil
	}
	return parseVDDK(text), nil
}

// parseVDDK parses an address of a disk that VDDK opens. It returns nil for other
// addresses.
func parseVDDK(text string) Address {
	if m := datastore.FindStringSubmatch(text); m != nil {
		return Datastore{m[1], m[2]}
	}
	if path, ok := strings.CutPrefix(text, vddkPrefix); ok {
		return VDDK{path}
	}
	return nil
}

// parseAppliance splits the address of an appliance at the last # that follows the
// path of one.
func parseAppliance(text string) (Appliance, bool) {
	if isApplianceName(text) {
		return Appliance{Path: text, text: text}, true
	}
	for i := len(text) - 1; i > 0; i-- {
		if text[i] == '#' && isApplianceName(text[:i]) {
			return Appliance{text[:i], text[i+1:], text}, true
		}
	}
	return Appliance{}, false
}

func isApplianceName(path string) bool {
	ext := strings.ToLower(filepath.Ext(path))
	return ext == ".ova" || ext == ".ovf"
}

// ForVDDK returns the address of the disk that VDDK opens as file, which may be a
// path of any kind or an address of such a disk already.
func ForVDDK(file string) Address {
	if a := parseVDDK(file); a != nil {
		return a
	}
	return VDDK{file}
}

// VDDKFile returns the file that VDDK opens for a, a datastore path or another
// path. It returns ok false if VDDK does not open a.
func VDDKFile(a Address) (file string, ok bool) {
	switch a := a.(type) {
	case Datastore:
		return a.String(), true
	case VDDK:
		return a.Path, true
	}
	return "", false
}

// IsRemote reports whether the disk at a is reached through an NBD server or
// VDDK. VDDK may open local files too.
func IsRemote(a Address) bool {
	switch a.(type) {
	case NBD, Datastore, VDDK:
		return true
	}
	return false
}
