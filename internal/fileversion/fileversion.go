// Package fileversion checks the versions of the formats of files that vddkcp writes and reads
// again later, such as journals and state files. Another version of vddkcp may have written such a
// file. A package that reads a format declares a [Format] and calls [Format.Check] before it reads
// anything else in the file.
package fileversion

import (
	"encoding/json"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/exit"
)

// Format describes a format and the versions of it that this vddkcp reads.
type Format struct {
	Name           string // of a file in this format, such as "journal"
	Oldest, Newest int
	// Otherwise is the hint for a user who does not have the vddkcp that wrote the file. It is an
	// instruction that begins in lower case.
	Otherwise string
}

// Error says that a file has a version that this vddkcp does not read.
type Error struct {
	Format Format
	Found  int64
}

// Check returns an *[Error] unless this vddkcp reads the given version.
func (f Format) Check(found int64) error {
	if found >= int64(f.Oldest) && found <= int64(f.Newest) {
		return nil
	}
	return &Error{f, found}
}

// CheckJSON checks the member "version" of a JSON object, without looking at any other member. A
// text that is no such object is not an error, because its reader reports that.
func (f Format) CheckJSON(text []byte) error {
	var file struct {
		Version *int64 `json:"version"`
	}
	if json.Unmarshal(text, &file) != nil || file.Version == nil {
		return nil
	}
	return f.Check(*file.Version)
}

// Versions returns a text that names the versions that this vddkcp reads.
func (f Format) Versions() string {
	if f.Oldest == f.Newest {
		return fmt.Sprintf("version %d", f.Newest)
	}
	return fmt.Sprintf("the versions %d to %d", f.Oldest, f.Newest)
}

func (e *Error) Error() string {
	return fmt.Sprintf("the %s has the format version %d, but this vddkcp reads only %s", e.Format.Name, e.Found, e.Format.Versions())
}

// Hint tells the user what to do about the error.
func (e *Error) Hint() string {
	if e.Found < 1 {
		return "no vddkcp writes this version, so the file is damaged or of another program: " + e.Format.Otherwise
	}
	writer := "the newer vddkcp"
	if e.Found < int64(e.Format.Newest) {
		writer = "the older vddkcp"
	}
	return "use " + writer + " that wrote the file, or " + e.Format.Otherwise
}

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (*Error) ExitStatus() int { return exit.Usage }
