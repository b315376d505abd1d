package batch

import (
	"fmt"
	"strconv"
	"strings"
)

// maxName is the length, in bytes, at which the name of a field is cut in messages.
const maxName = 64

// maxShown is the largest number of problems that the text of a FileError lists.
const maxShown = 200

// problem is a mistake in a job file, recorded while the file is loaded.
type problem struct {
	offset  int    // in the file
	field   string // "jobs[3].compress"; "": the file as a whole
	message string
	// These fields are set if the job file has a field that does not exist: unknown is the name of
	// that field, and known has the names that are allowed. When the problem is shown, the message
	// gets a suggestion from the allowed names. The suggestion is not made earlier, because finding
	// it takes time.
	unknown string
	known   []string
}

// FileError lists the mistakes in a job file.
type FileError struct {
	Name     string
	Problems []Problem // in the order of the file
}

// Problem is a mistake in a job file, as a FileError shows it. Lines and columns are counted
// from 1; a column is a character, not a byte.
type Problem struct {
	Line, Column int
	Field        string // "jobs[3].compres"; "": the file as a whole
	Message      string
}

func (p Problem) String() string {
	if p.Field == "" {
		return fmt.Sprintf("%d:%d: %s", p.Line, p.Column, p.Message)
	}
	return fmt.Sprintf("%d:%d: %s: %s", p.Line, p.Column, p.Field, p.Message)
}

func (e *FileError) Error() string { return strings.Join(e.Lines(), "\n") }

// Lines returns the text of the error, a line for each problem. It lists at most maxShown
// problems.
func (e *FileError) Lines() []string {
	if len(e.Problems) == 1 {
		return []string{e.Name + ":" + e.Problems[0].String()}
	}
	lines := []string{fmt.Sprintf("%s has %d problems:", e.Name, len(e.Problems))}
	for _, p := range e.Problems[:min(len(e.Problems), maxShown)] {
		lines = append(lines, e.Name+":"+p.String())
	}
	if more := len(e.Problems) - maxShown; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return lines
}

// A place is a part of the job file, such as jobs[3].source, that a message names. The method
// String composes the text of the name. It is called only if a message needs the text.
type place struct {
	base  string // "defaults", "jobs"
	index int    // of an element of base; -1: base itself
	name  string // of a member of the element; "": the element itself
}

func placeOf(base string) place { return place{base: base, index: -1} }

func (p place) String() string {
	s := p.base
	if p.index >= 0 {
		s += "[" + strconv.Itoa(p.index) + "]"
	}
	if p.name == "" {
		return s
	}
	if s != "" {
		s += "."
	}
	return s + quoted(p.name)
}

// The method member returns the place of a member of an object. p is the place of the object, and
// name is the name of the member.
func (p place) member(name string) place {
	if p.name != "" {
		return place{p.String(), -1, name}
	}
	p.name = name
	return p
}

// The method element returns the place of element i of an array. p is the place of the array.
func (p place) element(i int) place { return place{p.String(), i, ""} }

// The function quoted returns the name of a field for a message. If the name has other characters
// than field names usually have, the result is in quotes.
func quoted(name string) string {
	if len(name) > maxName {
		return strconv.Quote(name[:maxName])
	}
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_' && (r < 'A' || r > 'Z') && r != '-' {
			return strconv.Quote(name)
		}
	}
	if name == "" {
		return `""`
	}
	return name
}
