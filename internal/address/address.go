// Package address parses the addresses of disks. An address is the text that a user writes for
// SRC, DST or --backing. [Parse] turns the text into an [Address]. All other code switches on the
// type of the Address and does not look at the text.
package address

import (
	"path/filepath"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
)

// Address is the parsed address of a disk. Its type is one of [Path], [Appliance], [Datastore],
// [VDDK], [VM], [NBD], [Stream] and [Null].
type Address interface {
	// String returns the address as the user wrote it.
	String() string
	isAddress()
}

// Path is the path of a local file, block device, FIFO or character device.
type Path string

// Appliance is a disk of an appliance, which is an .ova or .ovf file. The address is written as
// PATH, PATH#NUMBER or PATH#NAME. Only sources can be appliances.
type Appliance struct {
	Path   string // of the .ova or .ovf file
	Choice string // number or name of the disk; "" if the address has none
	text   string
}

// Datastore is a disk on a VMware host, which is opened with VMware's VDDK library. Its address
// is "[STORE] PATH". The name of a datastore may contain brackets.
type Datastore struct{ Store, Path string }

// VDDK is a disk that is opened with VMware's VDDK library, whatever its path looks like. Its
// address is vddk:PATH. The path may be empty, because nbdkit's command line can leave out the
// file. The check of the VDDK parameters reports an empty path later.
type VDDK struct{ Path string }

// VM is a disk of a virtual machine on a vCenter server or an ESXi host. Its address is vm:NAME,
// vm:NAME#NUMBER or vm:NAME#LABEL. Only sources can be disks of a VM.
type VM struct {
	Name string // name, inventory path, moref=ID or uuid=UUID of the VM; a "#" is not escaped
	Disk string // number or label of the disk; "" if the address has none
	text string
}

// NBD is an export of an NBD server.
type NBD struct{ URI *nbd.URI }

// Stream is standard input or standard output. Its address is "-".
type Stream struct{}

// Null is the target that drops all data. Its address is "null:".
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

// String returns the address as the user wrote it. If Parse did not make the VM, String returns
// an address of the same disk.
func (a VM) String() string {
	if a.text != "" {
		return a.text
	}
	if a.Disk == "" {
		return vmPrefix + escapeHash(a.Name)
	}
	return vmPrefix + escapeHash(a.Name) + "#" + escapeHash(a.Disk)
}

// escapeHash escapes each # in the name of a VM. If the name itself has the text %23, the percent
// sign is escaped, as vSphere does in names.
func escapeHash(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s, hash, "%2523"), "#", hash)
}

// IsWhole reports whether the address names the appliance as a whole. Such an address is
// a PATH without #NUMBER or #NAME after it.
func (a Appliance) IsWhole() bool { return a.String() == a.Path }

func (Path) isAddress()      {}
func (Appliance) isAddress() {}
func (Datastore) isAddress() {}
func (VDDK) isAddress()      {}
func (VM) isAddress()        {}
func (NBD) isAddress()       {}
func (Stream) isAddress()    {}
func (Null) isAddress()      {}

// Role says what a command does with the disk at an address.
type Role int

// These are the roles of a disk.
const (
	Disk   Role = iota // the disk is read at arbitrary offsets, or served
	Source             // the disk is copied; its address may also be standard input
	Target             // the disk is written
)

const (
	stream     = "-"
	null       = "null:"
	vddkPrefix = "vddk:"
	vmPrefix   = "vm:"
	hash       = "%23" // a # in the name of a VM
)

var (
	// The expression datastore matches "[DATASTORE] DIR/DISK.vmdk".
	datastore = regexp.MustCompile(`(?s)^\[(.+?)\] (.+)$`)
	// keyValue matches a parameter of nbdkit-vddk-plugin, KEY=VALUE.
	keyValue = regexp.MustCompile(`^([A-Za-z][A-Za-z0-9._-]*)=`)
)

// Parse parses an address for a disk with the given role. It reads no file and contacts no server.
// Therefore a Path may name a file that does not exist.
//
// The error is a *usage.Error. Parse returns it for an address that the role does not allow. It
// also returns it for an address of another program (such as json:...), which would otherwise be
// taken for the name of a file. A user can name such a file by writing ./ before it.
func Parse(text string, role Role) (Address, error) {
	// No other kind of address begins with a slash. Absolute paths are parsed first, because this
	// is fast, and because loading a job file parses the absolute paths of many jobs.
	if strings.HasPrefix(text, "/") {
		return parsePath(text, role), nil
	}
	if role == Target {
		return parseTarget(text)
	}
	return parseSource(text, role)
}

// parsePath parses the path of a file or of an appliance.
func parsePath(text string, role Role) Address {
	if role != Target {
		if a, ok := parseAppliance(text); ok {
			return a
		}
	}
	return Path(text)
}

func parseSource(text string, role Role) (Address, error) {
	if a, err := parseAny(text); a != nil || err != nil {
		return a, err
	}
	if err := foreign(text, role); err != nil {
		return nil, err
	}
	if text == "" {
		return nil, usage.Errorf("the address of the disk is empty: want a path or another address")
	}
	if text == stream && role == Source {
		return Stream{}, nil
	}
	if text == stream {
		return nil, usage.Errorf("address \"-\": standard input is a stream, which this command cannot use as a disk (for a file that is named \"-\", write ./-)")
	}
	if m := keyValue.FindStringSubmatch(text); m != nil {
		// The error message does not include the value of the parameter, which may be a password.
		return nil, usage.Errorf("%s= is a parameter of nbdkit-vddk-plugin, not an address (for a file of that name write ./%[1]s=...)", m[1])
	}
	return parsePath(text, role), nil
}

func parseTarget(text string) (Address, error) {
	switch text {
	case "":
		return nil, usage.Errorf("the address of the target is empty: want a path, an NBD URI, \"-\" for standard output, or \"null:\" to write nothing")
	case stream:
		return Stream{}, nil
	case null:
		return Null{}, nil
	}
	a, err := parseAny(text)
	if err != nil {
		return nil, err
	}
	_, vddk := VDDKFile(a)
	if _, vm := a.(VM); vddk || vm {
		return nil, usage.Errorf("%s: vddkcp copies disks from VMware hosts, but does not write them there (for a file of that name write ./%[1]s)", text)
	}
	if a != nil {
		return a, nil
	}
	if err := foreign(text, Target); err != nil {
		return nil, err
	}
	return parsePath(text, Target), nil
}

// parseAny parses the kinds of addresses that mean the same in every role. It returns nil for an
// address of another kind.
func parseAny(text string) (Address, error) {
	if nbd.IsURI(text) {
		uri, err := nbd.ParseURI(text)
		if err != nil {
			return nil, usage.Errorf("%v", err)
		}
		return NBD{uri}, nil
	}
	if IsVM(text) {
		return parseVM(text)
	}
	return parseVDDK(text), nil
}

// IsVM reports whether an address is meant to name a disk of a VM, although it may be invalid.
func IsVM(text string) bool { return strings.HasPrefix(text, vmPrefix) }

// parseVM parses the address of a disk of a VM. The last # in the address is before the disk.
func parseVM(text string) (Address, error) {
	name, disk := text[len(vmPrefix):], ""
	if i := strings.LastIndexByte(name, '#'); i >= 0 {
		name, disk = name[:i], name[i+1:]
		if disk == "" {
			return nil, usage.New(text+": the number or label of the disk is missing after the #", "write a # in the name of a VM as %23")
		}
	}
	if name == "" {
		return nil, usage.New(text+": the name of the VM is missing", "write vm:NAME, or vm:NAME#NUMBER for one of several disks (for a file of that name write ./"+text+")")
	}
	return VM{strings.ReplaceAll(name, hash, "#"), strings.ReplaceAll(disk, hash, "#"), text}, nil
}

// parseVDDK parses the address of a disk that is opened with VDDK. It returns nil for any other
// address.
func parseVDDK(text string) Address {
	if m := datastore.FindStringSubmatch(text); m != nil {
		return Datastore{m[1], m[2]}
	}
	if path, ok := strings.CutPrefix(text, vddkPrefix); ok {
		return VDDK{path}
	}
	return nil
}

// parseAppliance splits the address of an appliance at the last # that follows the name of an .ova
// or .ovf file. The path of the file is before the #, and the disk after it. parseAppliance
// returns false for any other address.
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

// ForVDDK returns the address of a disk that is opened with VDDK. The parameter file is the path of
// the disk, or already an address such as vddk:PATH.
func ForVDDK(file string) Address {
	if a := parseVDDK(file); a != nil {
		return a
	}
	return VDDK{file}
}

// VDDKFile returns the name under which VDDK opens the disk at the given address, such as a
// datastore path. ok is false if the disk is not opened with VDDK.
func VDDKFile(address Address) (file string, ok bool) {
	switch address := address.(type) {
	case Datastore:
		return address.String(), true
	case VDDK:
		return address.Path, true
	}
	return "", false
}

// IsRemote reports whether the disk at the given address is read through an NBD server, with VDDK
// or from a VM on a server. VDDK can open local files, too; these also count as remote.
func IsRemote(address Address) bool {
	switch address.(type) {
	case NBD, Datastore, VDDK, VM:
		return true
	}
	return false
}
