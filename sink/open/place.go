package open

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/sink/raw"
)

// Place describes where a target is written. [PlaceOf] determines it from an
// address, and examines the file system only once.
type Place struct {
	Address address.Address
	Kind    string      // "file", "block device", "NBD export", "stream" or "null"; "" if the address cannot be a target
	Partial string      // of a file: its path until it is published
	info    os.FileInfo // of a FIFO or a character device
}

// PlaceOf returns the place of a target. It opens and changes nothing. Whether the
// target can be written is checked by Plan, not by PlaceOf.
func PlaceOf(a address.Address) Place {
	switch a := a.(type) {
	case address.Null:
		return Place{Address: a, Kind: "null"}
	case address.Stream:
		return Place{Address: a, Kind: "stream"}
	case address.NBD:
		return Place{Address: a, Kind: "NBD export"}
	case address.Path:
		return placeOfPath(a)
	}
	return Place{Address: a}
}

func placeOfPath(path address.Path) Place {
	if info, err := os.Stat(string(path)); err == nil {
		switch info.Mode().Type() {
		case fs.ModeDevice:
			return Place{Address: path, Kind: "block device"}
		case fs.ModeNamedPipe, fs.ModeDevice | fs.ModeCharDevice:
			return Place{Address: path, Kind: "stream", info: info}
		}
	}
	partial, err := raw.Partial(string(path))
	if err != nil {
		return Place{Address: path} // Plan returns the error
	}
	return Place{Address: path, Kind: "file", Partial: partial}
}

// Path returns the path that the target file will have after it is published.
func (p Place) Path() string { return strings.TrimSuffix(p.Partial, ".partial") }

// Format returns the format in which the target is written. The parameter requested
// is the format that the user asked for, or "". If it is empty, a file whose name
// ends in .qcow2 or .vmdk has the format qcow2 or vmdk, and all other targets have
// the format "raw".
func (p Place) Format(requested string) string {
	if requested != "" {
		return requested
	}
	switch ext := strings.ToLower(filepath.Ext(p.Address.String())); ext {
	case ".qcow2", ".vmdk":
		switch p.Kind {
		case "file", "": // "" is a file whose folder, for example, does not exist
			return ext[1:]
		}
	}
	return "raw"
}
