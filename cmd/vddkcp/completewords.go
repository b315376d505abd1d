package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/exit"
)

// completeWord is the first word of the command line with which a completion script asks vddkcp
// what the user can type next. docs/cli.md reserves the word.
const completeWord = "__complete"

// completions are what the last word of a command line can become.
type completions struct {
	paths  pathKind
	prefix string // the part of the last word that stands before the path, such as "--report="
	words  []completion
}

// A completion is a whole word, even if only a part of it follows an equals sign.
type completion struct{ word, about string }

// pathKind says whether the last word can become a path, which the shell completes.
type pathKind string

const (
	noPath  pathKind = "none"
	anyPath pathKind = "files"
	folder  pathKind = "folders"
)

// printCompletions prints what the last word of a command line can become. The first argument is
// the name of the shell. The others are the words of the line up to the cursor, without the name of
// the program. They are as the user typed them, so they may have quotes, except in fish, which has
// removed the quotes of all words except the last one. The first line of the output has the
// pathKind and the prefix. Each further line has a completion, with a tab before the description.
//
// A key press must not wait for a network: vddkcp asks no server. Mistakes on the line are not
// reported here, because the shell would print them into the line that the user edits.
func printCompletions(w io.Writer, app *kong.Application, args []string) int {
	if len(args) < 2 {
		return exit.Usage
	}
	typed := slices.Clone(args[1:])
	for i, word := range typed {
		if args[0] != "fish" || i == len(typed)-1 {
			typed[i] = unquote(word)
		}
	}
	c := complete(app, typed)
	var out strings.Builder
	fmt.Fprintf(&out, "%s %s\n", c.paths, c.prefix)
	for _, word := range c.words {
		// A name with a line end would become two completions.
		if strings.HasPrefix(word.word, typed[len(typed)-1]) && !strings.ContainsFunc(word.word, unicode.IsControl) {
			fmt.Fprintf(&out, "%s\t%s\n", word.word, word.about)
		}
	}
	if _, err := io.WriteString(w, out.String()); err != nil {
		return exit.Failed
	}
	return 0
}

// The function unquote removes the quotes of a shell from a word. The end of a quoted text may be
// missing, because the user is still typing it.
func unquote(word string) string {
	var out strings.Builder
	quote := rune(0)
	escaped := false
	for _, r := range word {
		switch {
		case escaped:
			if quote == '"' && !strings.ContainsRune("\"\\$`", r) {
				out.WriteByte('\\')
			}
			out.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			escaped = true
		case quote == 0 && (r == '\'' || r == '"'):
			quote = r
		case r == quote:
			quote = 0
		default:
			out.WriteRune(r)
		}
	}
	return out.String()
}

// typedLine is a command line whose last word is not complete.
type typedLine struct {
	app      *kong.Application
	command  *kong.Node // the node of the program as long as no word has chosen a command
	operands []string
	values   map[string][]string // values of flags, by the names of the flags
	ended    bool                // the word -- has ended the flags
}

// The function complete returns what the last of the given words can become.
func complete(app *kong.Application, words []string) completions {
	l := &typedLine{app: app, command: app.Node, values: map[string][]string{}}
	last := len(words) - 1
	var valueOf *kong.Flag // the flag whose value is the next word
	for _, word := range words[:last] {
		valueOf = l.read(word, valueOf)
	}
	word := words[last]
	switch {
	case valueOf != nil:
		return l.value(valueOf, word, "")
	case !l.ended && strings.HasPrefix(word, "--"):
		if name, value, valued := strings.Cut(word, "="); valued {
			if f := l.flag(name); f != nil {
				return l.value(f, value, name+"=")
			}
			return completions{paths: noPath}
		}
		return completions{paths: noPath, words: l.flags()}
	case !l.ended && strings.HasPrefix(word, "-") && word != "-":
		return completions{paths: noPath, words: l.flags()}
	}
	return l.operand(word)
}

// The method read takes a complete word into account. The parameter valueOf is the flag whose value
// the word is. It is nil for other words. The result is the flag whose value is the next word.
func (l *typedLine) read(word string, valueOf *kong.Flag) *kong.Flag {
	switch {
	case valueOf != nil:
		l.values[valueOf.Name] = append(l.values[valueOf.Name], word)
	case !l.ended && word == "--":
		l.ended = true
	case !l.ended && strings.HasPrefix(word, "-") && word != "-":
		name, value, valued := strings.Cut(word, "=")
		f := l.flag(name)
		if f == nil {
			return nil
		}
		if valued {
			l.values[f.Name] = append(l.values[f.Name], value)
		} else if !f.IsBool() {
			return f
		}
	default:
		for _, c := range l.command.Children {
			if c.Name == word && len(l.operands) == 0 && !l.ended {
				l.command = c
				return nil
			}
		}
		l.operands = append(l.operands, word)
	}
	return nil
}

// The method node returns the command of the line, which is the default one if no word has chosen a
// command.
func (l *typedLine) node() *kong.Node {
	if l.command == l.app.Node {
		return l.app.DefaultCmd
	}
	return l.command
}

// The method flag returns the flag for a word such as --name or -n, and nil if the command has no
// such flag. If the word has several short flags, such as -vD, it returns the last one.
func (l *typedLine) flag(word string) *kong.Flag {
	for _, group := range l.node().AllFlags(true) {
		for _, f := range group {
			if word == "--"+f.Name || f.Short != 0 && !strings.HasPrefix(word, "--") && strings.HasSuffix(word, string(f.Short)) {
				return f
			}
		}
	}
	return nil
}

// The method flags returns the flags of the command.
func (l *typedLine) flags() (words []completion) {
	for _, group := range l.node().AllFlags(true) {
		for _, f := range group {
			words = append(words, completion{"--" + f.Name, brief(f.Help)})
		}
	}
	return words
}

// flagValues are values of flags that accept other values, too, or of flags whose declarations do
// not list their values.
var flagValues = map[string][]string{
	"compress":    {"none", "zlib", "zstd"},
	"compression": {"none", "zlib", "fastlz", "skipz"},
	"connections": {"auto"},
	"debug":       {"vddk.diskinfo=1", "vddk.extents=1", "vddk.datapath=1", "vddk.stats=1"},
	"digest":      {"blksum", "sha256"},
	"quiesce":     {"try"},
	"retries":     {"unlimited"},
	"transports":  {"file", "san", "hotadd", "nbdssl", "nbd"},
	"vm":          {"moref="},
}

// The method value returns what the value of a flag can become. The parameter before is the part of
// the last word that stands before the value.
func (l *typedLine) value(f *kong.Flag, value, before string) completions {
	c := completions{paths: noPath}
	add := func(word, about string) { c.words = append(c.words, completion{before + word, about}) }
	values := flagValues[f.Name]
	if f.Enum != "" {
		values = f.EnumSlice()
	}
	for _, v := range values {
		if v != "" {
			add(v, "")
		}
	}
	switch {
	case f.Name == "profile":
		for _, p := range profileNames() {
			add(p.word, p.about)
		}
	case f.Name == "only" || f.Name == "label":
		list := "" // the names before the last comma
		if i := strings.LastIndexByte(value, ','); i >= 0 && f.Name == "only" {
			list = value[:i+1]
		}
		for _, v := range l.jobs(f.Name) {
			add(list+v, "")
		}
	case strings.Contains(f.PlaceHolder, "+FILE"):
		if strings.HasPrefix(value, "+") {
			c.paths, c.prefix = anyPath, before+"+"
		}
	case strings.HasSuffix(f.PlaceHolder, "=SRC") || strings.HasSuffix(f.PlaceHolder, "=ADDRESS"):
		if name, _, found := strings.Cut(value, "="); found {
			c.paths, c.prefix = anyPath, before+name+"="
		}
	case f.Name == "listen":
		add("unix:", "")
		add("tcp://", "")
		add("systemd", "")
		if strings.HasPrefix(value, "unix:") {
			c.paths, c.prefix = anyPath, before+"unix:"
		}
	case f.Name == "target" || strings.Contains(f.PlaceHolder, "FILE"):
		c.paths, c.prefix = anyPath, before
	case f.PlaceHolder == "DIR" && f.Name == "libdir":
		c.paths, c.prefix = anyPath, before // the library itself is a file
	case f.PlaceHolder == "DIR":
		c.paths, c.prefix = folder, before
	}
	return c
}

// The method operand returns what a word that is not a flag can become.
func (l *typedLine) operand(word string) completions {
	c := completions{paths: noPath}
	if len(l.operands) == 0 && !l.ended {
		for _, command := range l.command.Children {
			if !command.Hidden {
				c.words = append(c.words, completion{command.Name, brief(command.Help)})
			}
		}
	}
	node := l.node()
	if len(l.operands) >= len(node.Positional) {
		return c
	}
	a := node.Positional[len(l.operands)]
	switch {
	case a.Enum != "":
		for _, v := range a.EnumSlice() {
			c.words = append(c.words, completion{v, ""})
		}
	case node.Path() == "profile remove":
		c.words = append(c.words, profileNames()...)
	case slices.Contains([]string{"SRC", "DST", "JOBS"}, a.Name):
		c.paths = anyPath
		if a.Name == "DST" && node.Name == "copy" && word != "" {
			c.words = append(c.words, completion{"null:", "read SRC without writing anything"})
		}
	}
	return c
}

// The function brief returns the beginning of a help text, for the lists of zsh and fish: the first
// sentence, or its part before details.
func brief(help string) string {
	for _, end := range []string{". ", ": ", " ("} {
		help, _, _ = strings.Cut(help, end)
	}
	return strings.TrimSuffix(help, ".")
}

func profileNames() (words []completion) {
	profiles, _ := newConfig().List() // a wrong file is reported when it is used
	for _, p := range profiles {
		words = append(words, completion{p.Name, p.Server})
	}
	return words
}

// maxCompletedJobs is the largest job file in bytes that is read for a completion, so that the
// shell does not wait for long.
const maxCompletedJobs = 16 << 20

// The method jobs returns the names of the jobs in the job file that the line names, or their
// labels if the parameter of is "label".
func (l *typedLine) jobs(of string) (found []string) {
	if len(l.operands) == 0 {
		return nil
	}
	path := l.operands[0]
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		path = filepath.Join(os.Getenv("HOME"), rest)
	}
	if fi, err := os.Stat(path); err != nil || !fi.Mode().IsRegular() || fi.Size() > maxCompletedJobs {
		return nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	type job struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels"`
	}
	var file struct {
		Defaults job   `json:"defaults"`
		Jobs     []job `json:"jobs"`
	}
	if json.Unmarshal(text, &file) != nil {
		return nil
	}
	for i, j := range file.Jobs {
		if of == "only" {
			found = append(found, cmp.Or(j.Name, strconv.Itoa(i)))
			continue
		}
		for _, labels := range []map[string]string{file.Defaults.Labels, j.Labels} {
			for key, value := range labels {
				found = append(found, key+"="+value)
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}
