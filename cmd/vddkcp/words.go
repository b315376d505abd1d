package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/nearest"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// wordsFor says how a command interprets KEY=VALUE words of nbdkit.
type wordsFor int

const (
	wordsForOneDisk  wordsFor = iota // for info and map
	wordsForTwoDisks                 // for copy and verify: the last word without = is DST
	wordsForExport                   // for export: export= is allowed
	wordsForLibrary                  // for vddk: no disk is needed
)

// The type words contains the flags and addresses of vddkcp that mean the same as a command
// line of KEY=VALUE words.
type words struct {
	Flags  []string // a flag "--KEY=VALUE" for each parameter
	Src    string   // address of the disk; "" if it is left out and not needed, "vddk:" if it is left out and needed
	Dst    string
	Export string // value of export=, a wildcard
}

// keyValue matches a KEY=VALUE word of nbdkit.
var keyValue = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]*=`)

// These are the parameters of nbdkit-vddk-plugin. For each parameter in flagKeys, vddkcp
// has a flag of the same name. The flags in boolKeys, which are also in flagKeys, are
// boolean.
var (
	flagKeys = []string{
		"compression", "config", "cookie", "libdir", "nfchostport", "password", "port", "server", "single-link",
		"snapshot", "thumbprint", "transports", "unbuffered", "user", "vm",
	}
	boolKeys  = []string{"single-link", "unbuffered"}
	otherKeys = []string{"file", "export", "vimapiver"}
)

// parseWords interprets the operands of a command line, at least one of which is a
// KEY=VALUE word. If a key is repeated, the last value counts, as with nbdkit. Errors
// do not contain values, which may be secrets.
func parseWords(operands []string, kind wordsFor) (*words, error) {
	w := new(words)
	file, named := "", false
	var bare []string
	for _, operand := range operands {
		if !keyValue.MatchString(operand) {
			bare = append(bare, operand)
			continue
		}
		key, value, _ := strings.Cut(operand, "=")
		switch {
		case slices.Contains(boolKeys, key):
			b, err := nbdkitBool(value)
			if err != nil {
				return nil, usage.Errorf("%s=: %w", key, err)
			}
			w.Flags = append(w.Flags, fmt.Sprintf("--%s=%t", key, b))
		case slices.Contains(flagKeys, key):
			w.Flags = append(w.Flags, "--"+key+"="+value)
		case key == "file":
			file, named = value, true
		case key == "vimapiver": // ignored, as by the plugin
		case key == "export" && kind == wordsForExport:
			w.Export = value
		case key == "export":
			return nil, usage.Errorf("export=: only the command export has this parameter, which lets clients choose disks")
		case key == "create" || strings.HasPrefix(key, "create-"):
			return nil, usage.Errorf("the parameter %s= is not supported, because vddkcp does not create VMDKs through VDDK", key)
		default:
			return nil, usage.New(
				fmt.Sprintf("%s= is not a parameter of nbdkit-vddk-plugin; did you mean %s=?", key, nearest.Of(key, slices.Concat(flagKeys, otherKeys))),
				fmt.Sprintf("for a file of that name write ./%s=...", key))
		}
	}
	if kind == wordsForTwoDisks {
		if len(bare) == 0 {
			return nil, usage.Errorf("the target DST is missing: all arguments have the form KEY=VALUE, and DST must follow them")
		}
		w.Dst, bare = bare[len(bare)-1], bare[:len(bare)-1]
	}
	disks := bare
	if named {
		disks = append(disks, file)
	}
	if len(disks) > 1 {
		return nil, usage.Errorf("more than one disk is given: %s", strings.Join(disks, ", "))
	}
	for _, disk := range disks {
		if address.IsVM(disk) {
			return nil, usage.New(fmt.Sprintf("%s: the name of a VM cannot stand among KEY=VALUE words, which name a disk by its path", disk), "write flags instead of the words, such as --server=HOST for server=HOST")
		}
	}
	if len(bare) == 1 {
		file, named = bare[0], true
	}
	if named || kind == wordsForOneDisk || kind == wordsForTwoDisks || kind == wordsForExport && w.Export == "" {
		// If no disk is named, the address is "vddk:" with an empty path. The check of
		// the VDDK parameters, which runs later, reports the disk as missing, together
		// with other missing parameters.
		w.Src = address.ForVDDK(file).String()
	}
	return w, nil
}

// nbdkitBool parses a boolean value as nbdkit does.
func nbdkitBool(s string) (bool, error) {
	switch strings.ToLower(s) {
	case "1", "true", "t", "yes", "y", "on":
		return true, nil
	case "0", "false", "f", "no", "n", "off":
		return false, nil
	}
	return false, fmt.Errorf("value %q: want true or false", s)
}

// rewriteWords replaces the KEY=VALUE words of a command line by flags. The result
// exists only in the memory of this process. Other processes cannot see secrets in it.
// A line without such words is returned unchanged.
func rewriteWords(app *kong.Application, args []string) ([]string, error) {
	line := splitLine(app, args)
	if line == nil || !slices.ContainsFunc(line.operands, keyValue.MatchString) {
		return args, nil
	}
	var kind wordsFor
	switch line.command.Name {
	case "copy":
		kind = wordsForTwoDisks
	case "verify":
		kind = wordsForTwoDisks
		if line.has["digest"] {
			kind = wordsForOneDisk
		}
	case "info", "map":
		kind = wordsForOneDisk
	case "export":
		kind = wordsForExport
	case "vddk":
		kind = wordsForLibrary
	default:
		return args, nil
	}
	w, err := parseWords(line.operands, kind)
	if err != nil {
		return nil, err
	}
	rewritten := append([]string{line.command.Name}, line.flags...)
	if kind == wordsForLibrary {
		for _, f := range w.Flags {
			if strings.HasPrefix(f, "--libdir=") {
				rewritten = append(rewritten, f)
			}
		}
		return rewritten, nil
	}
	rewritten = append(rewritten, w.Flags...)
	if w.Export != "" {
		rewritten = append(rewritten, "--export-pattern="+w.Export)
	}
	if w.Src == "" { // only export= is given
		return rewritten, nil
	}
	rewritten = append(rewritten, "--", w.Src)
	if kind == wordsForTwoDisks {
		rewritten = append(rewritten, w.Dst)
	}
	return rewritten, nil
}

// commandLine is a command line divided into flags and operands.
type commandLine struct {
	command  *kong.Node
	chosen   bool     // the line names the command, so it is not the default one
	flags    []string // flags with their values
	has      map[string]bool
	operands []string
}

// splitLine divides a command line as the parser does. It returns nil if a flag is
// unknown, because the parser reports this error with a better message.
func splitLine(app *kong.Application, args []string) *commandLine {
	line := &commandLine{command: app.DefaultCmd, has: map[string]bool{}}
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			line.operands = append(line.operands, args[i+1:]...)
			return line
		case arg == "-" || !strings.HasPrefix(arg, "-"):
			command := commandNamed(app, arg)
			if !line.chosen && len(line.operands) == 0 && command != nil {
				line.command, line.chosen = command, true
				continue
			}
			line.operands = append(line.operands, arg)
		default:
			known, next := line.flag(arg)
			if !known {
				return nil
			}
			line.flags = append(line.flags, arg)
			if next && i+1 < len(args) {
				i++
				line.flags = append(line.flags, args[i])
			}
		}
	}
	return line
}

func commandNamed(app *kong.Application, name string) *kong.Node {
	for _, c := range app.Children {
		if c.Name == name {
			return c
		}
	}
	return nil
}

// The method flag records the flags in a word of the command line: one flag in --NAME,
// several in -abc. The result known is false if one of these flags does not exist. The
// result next is true if the value of the last flag is the next word of the command line.
func (l *commandLine) flag(arg string) (known, next bool) {
	if name, ok := strings.CutPrefix(arg, "--"); ok {
		name, _, valued := strings.Cut(name, "=")
		f := l.find(func(f *kong.Flag) bool { return f.Name == name })
		if f == nil {
			return false, false
		}
		l.has[name] = true
		return true, !valued && !f.IsBool()
	}
	for i, short := range arg[1:] {
		f := l.find(func(f *kong.Flag) bool { return f.Short == short })
		if f == nil {
			return false, false
		}
		l.has[f.Name] = true
		if !f.IsBool() {
			return true, i+2 == len(arg)
		}
	}
	return true, false
}

func (l *commandLine) find(is func(*kong.Flag) bool) *kong.Flag {
	for _, group := range l.command.AllFlags(false) {
		for _, f := range group {
			if is(f) {
				return f
			}
		}
	}
	return nil
}
