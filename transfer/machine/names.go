package machine

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/nearest"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// MaxName is the largest length in bytes of a file name that a [Template] makes. A file system
// allows 255 bytes. The rest is for the ends of the names of further files, such as
// ".partial.journal".
const MaxName = 225

// A value that is shortened keeps at least shortest bytes. These are at least one character, and
// then the hash of the whole value.
const (
	shortest = 16
	hashSize = 1 + 8 // "~" and 8 hexadecimal digits
)

// placeholder matches a placeholder of a template, which is replaced by a fact of the disk.
var placeholder = regexp.MustCompile(`\{([^{}/]*)\}`)

// placeholders are the names that can stand between braces in a template.
var placeholders = []string{"vm", "n", "key", "label", "folder", "moref"}

// Template makes the address of a target for each disk of each VM. Its text has placeholders in
// braces, which [Template.Target] replaces:
//
//	{vm}      name of the VM
//	{n}       number of the disk
//	{key}     device key of the disk
//	{label}   label of the disk, such as "Hard disk 1"
//	{folder}  path of the folder of the VM
//	{moref}   managed object reference of the VM
//
// The names come from the server. In a file name, [CleanName] changes them.
type Template struct {
	folder string // before the text; its braces are no placeholders; "" or ends in a slash
	text   string
	kind   address.Address // what the addresses are: a Path, an NBD or a Null
}

// ParseTemplate parses a template. The error is a *usage.Error.
func ParseTemplate(text string) (*Template, error) {
	for _, m := range placeholder.FindAllStringSubmatch(text, -1) {
		if !slices.Contains(placeholders, m[1]) {
			return nil, usage.New(fmt.Sprintf("%s: %s is not a placeholder; did you mean {%s}?", text, m[0], nearest.Of(m[1], placeholders)),
				"the placeholders are {"+strings.Join(placeholders, "}, {")+"}")
		}
	}
	kind, err := address.Parse(placeholder.ReplaceAllString(text, "x"), address.Target)
	if err != nil {
		return nil, fmt.Errorf("the template %s: %w", text, err)
	}
	if _, ok := kind.(address.Stream); ok {
		return nil, usage.Errorf("the template %s: the disks of a VM cannot be written to standard output: want a path or an NBD URI with placeholders such as {vm} and {n}", text)
	}
	return &Template{"", text, kind}, nil
}

// ParseTarget parses the target of a VM: the path of a folder, or a template. In an existing folder,
// and below a path that ends in a slash, the files get the names VM-diskN with the end that is usual
// for the given format. The formats are those of --format, and "" stands for raw.
func ParseTarget(text, format string) (*Template, error) {
	if format == "" {
		format = "raw"
	}
	name := "{vm}-disk{n}." + format
	if info, err := os.Stat(text); err == nil && info.IsDir() { // braces are part of its name
		return &Template{strings.TrimRight(text, "/") + "/", name, address.Path(text)}, nil
	}
	if !strings.HasSuffix(text, "/") {
		return ParseTemplate(text)
	}
	t, err := ParseTemplate(text + name)
	if err != nil {
		return nil, err
	}
	if _, ok := t.kind.(address.Path); ok && !strings.Contains(text, "{") {
		t.folder, t.text = text, name
	}
	return t, nil
}

// Folder returns the folder DST of [ParseTarget] if all files are directly in it, and "" otherwise. The
// folder need not exist.
func (t *Template) Folder() string { return t.folder }

// String returns the text of the template.
func (t *Template) String() string { return t.folder + t.text }

// Target returns the address of the target for a disk. In a path, each value is one name without
// a slash. If the name of a file or folder would be longer than MaxName, its values are shortened.
// A shortened value ends with a hash of the whole value, so that different values stay different.
// The error is a *usage.Error, for a template whose own text is too long.
func (t *Template) Target(vm *inventory.VM, d *inventory.Disk) (string, error) {
	value := func(name string) string {
		switch name {
		case "vm":
			return vm.Name
		case "n":
			return strconv.Itoa(d.N)
		case "key":
			return strconv.Itoa(int(d.Key))
		case "label":
			return d.Label
		case "folder":
			return vm.Folder
		}
		return vm.Moref
	}
	switch t.kind.(type) {
	case address.Null:
		return t.text, nil
	case address.NBD:
		return t.replace(t.text, func(name string) string { return url.PathEscape(value(name)) }), nil
	}
	names := strings.Split(t.text, "/")
	for i, name := range names {
		var err error
		if names[i], err = t.fileName(name, func(name string) string { return CleanName(value(name)) }); err != nil {
			return "", err
		}
	}
	path := t.folder + strings.Join(names, "/")
	if a, err := address.Parse(path, address.Target); err != nil || a != address.Path(path) {
		path = "./" + path // the name of a VM may look like another kind of address
	}
	return path, nil
}

func (t *Template) replace(text string, value func(name string) string) string {
	return placeholder.ReplaceAllStringFunc(text, func(s string) string { return value(s[1 : len(s)-1]) })
}

// fileName replaces the placeholders in the name of a file or folder, and shortens the values if
// necessary.
func (t *Template) fileName(text string, value func(name string) string) (string, error) {
	var values []string
	long := t.replace(text, func(name string) string {
		values = append(values, value(name))
		return values[len(values)-1]
	})
	if len(long) <= MaxName || len(values) == 0 {
		return long, nil
	}
	literal := len(long)
	for _, v := range values {
		literal -= len(v)
	}
	// The longest values are shortened to the greatest length that fits.
	limit := MaxName
	for ; limit >= shortest; limit-- {
		size := literal
		for _, v := range values {
			size += min(len(v), limit)
		}
		if size <= MaxName {
			return t.replace(text, func(name string) string { return shorten(value(name), limit) }), nil
		}
	}
	return "", usage.Errorf("the template %s: a file name has more than %d bytes without the values of its placeholders", t.text, MaxName-shortest*len(values))
}

// The function shorten returns s if it has at most limit bytes. Otherwise it returns the beginning
// of s and a hash of s, together at most limit bytes.
func shorten(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	end := limit - hashSize
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	sum := sha256.Sum256([]byte(s))
	return s[:end] + "~" + hex.EncodeToString(sum[:4])
}

// CleanName returns a name from a server as the name of a file. It replaces slashes, control
// characters, invalid UTF-8, and a "." or "-" at the beginning by "_". An empty name becomes "_".
// The names of different VMs may become the same file name; [CheckTargets] finds these.
func CleanName(name string) string {
	clean := strings.Map(func(r rune) rune {
		if r == '/' || r == utf8.RuneError || unicode.IsControl(r) {
			return '_'
		}
		return r
	}, name)
	if clean == "" || clean[0] == '.' || clean[0] == '-' {
		return "_" + clean[min(1, len(clean)):]
	}
	return clean
}

// Target is the address to which a disk of a VM will be copied.
type Target struct {
	VM      *inventory.VM
	Disk    *inventory.Disk
	Address string
}

// CheckTargets returns a *usage.Error if several disks have the same target, or if the target of a
// disk is a file that the copy of another disk needs. The error lists all of these disks.
func CheckTargets(targets []Target) error {
	users := map[string][]*Target{}
	var files []string // keys of users, in the order of targets
	add := func(file string, t *Target) {
		if len(users[file]) == 0 {
			files = append(files, file)
		}
		users[file] = append(users[file], t)
	}
	first := firstNames{}
	for i := range targets {
		t := &targets[i]
		switch a, err := address.Parse(t.Address, address.Target); a.(type) {
		case address.Null:
		case address.Path:
			path := filepath.Clean(t.Address)
			add(cmp.Or(first.nameOf(path), path), t)
			add(path+".partial", t)
			add(path+".partial.journal", t)
		default:
			if err == nil {
				add(t.Address, t)
			}
		}
	}
	var lines []string
	reported := map[string]bool{} // of disks, so that each group of disks is in the error once
	for _, file := range files {
		if len(users[file]) < 2 {
			continue
		}
		line := ""
		for _, t := range users[file] {
			line += fmt.Sprintf(", disk %d of the VM %q (%s)", t.Disk.N, t.VM.Name, t.VM.Moref)
		}
		if !reported[line] {
			reported[line] = true
			lines = append(lines, fmt.Sprintf("  %q: %s", file, line[2:]))
		}
	}
	if lines == nil {
		return nil
	}
	return usage.WithHint(&sameTargetError{lines}, "add {n} to the template of the target for VMs with several disks, and {folder} or {moref} for VMs of the same name")
}

// firstNames has the first path of each file and device that exists. A file or device may have several
// paths, such as /dev/sdb and a symbolic link in /dev/disk.
type firstNames map[[3]uint64]string

// nameOf returns the first path of the file or device at the given path, or "" if it does not exist.
func (f firstNames) nameOf(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return ""
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&os.ModeCharDevice != 0 {
		return ""
	}
	id := [3]uint64{st.Dev, st.Ino, 0}
	if info.Mode()&os.ModeDevice != 0 {
		id = [3]uint64{0, 0, st.Rdev}
	}
	if f[id] == "" {
		f[id] = path
	}
	return f[id]
}

// sameTargetError lists the disks that would be copied to the same target.
type sameTargetError struct{ lines []string }

func (e *sameTargetError) Error() string { return strings.Join(e.Lines(), "\n") }

// Lines returns the lines of the message.
func (e *sameTargetError) Lines() []string {
	return append([]string{"several disks would be copied to the same file:"}, e.lines...)
}
