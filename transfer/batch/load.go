package batch

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/nearest"
)

// Load reads a job file. name is the file's name, for messages. Relative paths in the file
// start from dir, an absolute path. If the file has mistakes, the error is a *[FileError] that
// lists them all.
func Load(r io.Reader, name, dir string, spec *Spec) (*File, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	l := newLoader(string(text), dir, spec)
	file := new(File)
	if len(text) > maxFile {
		l.problems = append(l.problems, problem{message: fmt.Sprintf("the file is longer than %s, the limit for a job file", bytesize.Format(maxFile))})
	} else if root, bad := parseTree(text); bad != nil {
		l.problems = append(l.problems, *bad)
	} else {
		file = l.file(root)
	}
	if len(l.problems) == 0 {
		file.Warnings = l.warnings
		return file, nil
	}
	slices.SortStableFunc(l.problems, func(a, b problem) int { return cmp.Compare(a.offset, b.offset) })
	at := newLines(text)
	e := &FileError{Name: name}
	for i, p := range l.problems {
		line, column := at.of(p.offset)
		if p.known != nil && i < maxShown {
			p.message += fmt.Sprintf("; did you mean %q?", nearest.Of(strings.ReplaceAll(strings.ToLower(p.unknown), "-", "_"), p.known))
		}
		e.Problems = append(e.Problems, Problem{line, column, p.field, p.message})
	}
	return nil, e
}

type loader struct {
	content  string // the file
	dir      string
	spec     *Spec
	fields   map[string]int // indexes in spec.Fields, by name
	known    *nameSet       // the names of all fields of a job
	problems []problem
	warnings []string
}

func newLoader(text, dir string, spec *Spec) *loader {
	l := &loader{content: text, dir: dir, spec: spec, fields: map[string]int{}}
	known := names(jobFields)
	for i := range spec.Fields {
		l.fields[spec.Fields[i].Name] = i
		known = append(known, spec.Fields[i].Name)
	}
	l.known = newNameSet(known)
	return l
}

// nameSet holds a list of names, and a map to look a name up quickly.
type nameSet struct {
	all []string
	has map[string]bool
}

func newNameSet(all []string) *nameSet {
	s := &nameSet{all, map[string]bool{}}
	for _, name := range all {
		s.has[name] = true
	}
	return s
}

func (l *loader) bad(at int, field fmt.Stringer, format string, args ...any) {
	l.problems = append(l.problems, problem{offset: at, field: field.String(), message: fmt.Sprintf(format, args...)})
}

// The method want reports whether the value n has one of the given kinds. If not, it records a
// problem. The message of the problem says what was expected, and the parameter wanted is the text
// for this.
func (l *loader) want(n *node, field place, wanted string, kinds ...kind) bool {
	if slices.Contains(kinds, n.kind) {
		return true
	}
	l.bad(n.offset, field, "want %s, found %s", wanted, n.kind.named())
	return false
}

// The method object calls the function handleMember for each member of the JSON object n. If the
// name of a member is repeated or is not in allowedNames, the method does not call the function for
// this member, but records a problem. If allowedNames is nil, all names are allowed.
func (l *loader) object(n *node, field place, allowedNames *nameSet, handleMember func(m member, field place)) {
	if !l.want(n, field, "an object", kindObject) {
		return
	}
	var seen map[string]bool
	if len(n.members) > 32 { // for fewer members comparing is faster
		seen = map[string]bool{}
	}
	for i, m := range n.members {
		at := field.member(m.name)
		twice := seen[m.name]
		if seen == nil {
			twice = slices.ContainsFunc(n.members[:i], func(o member) bool { return o.name == m.name })
		} else {
			seen[m.name] = true
		}
		switch {
		case twice:
			l.bad(m.offset, at, "the field appears twice")
		case allowedNames != nil && !allowedNames.has[m.name]:
			l.unknown(m, field, allowedNames.all)
		default:
			handleMember(m, at)
		}
	}
}

func (l *loader) unknown(m member, in place, known []string) {
	field := in.member(m.name)
	if reason := notOfAJob(m.name); reason != "" && (in.base == "jobs" || in.base == "defaults") {
		l.bad(m.offset, field, "not a field of a job: %s", reason)
		return
	}
	l.bad(m.offset, field, "unknown field")
	if len(m.name) <= maxName {
		p := &l.problems[len(l.problems)-1]
		p.unknown, p.known = m.name, known
	}
}

// notOfAJob returns the reason why a flag of vddkcp copy cannot be a field of a job. It gets the
// name of the flag in the spelling of fields, such as "dry_run" for --dry-run. For names that do
// not belong to such a flag, the result is "".
func notOfAJob(name string) string {
	switch {
	case name == "progress" || name == "report" || name == "metrics" || name == "resume":
		return fmt.Sprintf("--%s applies to the whole run", name)
	case name == "dry_run":
		return "use vddkcp run --check, which checks all jobs"
	case name == "nfc_trace":
		return "use vddkcp copy --nfc-trace, which records the messages of one copy"
	case strings.HasPrefix(name, "log_") || name == "verbose":
		return "the log flags of vddkcp run apply to all jobs; see --log-dir"
	}
	return ""
}

func (l *loader) file(root *node) *File {
	f := &File{ContinueOnError: true, Limits: Limits{Rounds: DefaultRounds}}
	var jobs *node
	defaults := &draft{ok: true}
	version := false
	l.object(root, placeOf(""), newNameSet(names(topFields)), func(m member, field place) {
		switch m.name {
		case "version":
			version = true
			if m.value.kind != kindNumber || m.value.text != "1" {
				l.bad(m.value.offset, field, "the version of a job file must be 1, because this vddkcp reads only version 1")
			}
		case "continue_on_error":
			if l.want(m.value, field, "a boolean", kindBoolean) {
				f.ContinueOnError = m.value.text == "true"
			}
		case "limits":
			l.limits(m.value, &f.Limits)
		case "defaults":
			defaults = l.draft(m.value, placeOf("defaults"))
		case "jobs":
			if l.want(m.value, field, "an array", kindArray) {
				jobs = m.value
			}
		}
	})
	if root.kind == kindObject && !version {
		l.bad(root.offset, placeOf("version"), `missing: want "version": 1`)
	}
	switch {
	case root.kind != kindObject:
	case jobs == nil && !slices.ContainsFunc(root.members, func(m member) bool { return m.name == "jobs" }):
		l.bad(root.offset, placeOf("jobs"), "missing: want an array of jobs")
	case jobs != nil && len(jobs.unread) == 0:
		l.bad(jobs.offset, placeOf("jobs"), "the array is empty: want at least one job")
	case jobs != nil:
		l.jobs(jobs, defaults, f)
	}
	return f
}

// draft is a parsed job before it is merged with the defaults. The defaults of the file are a draft
// as well.
type draft struct {
	node        *node
	labels      map[string]string
	hookTimeout time.Duration
	values      []fieldValue // of fields that are no flags, in the order of the file
	flags       []flagValue  // in the order of Spec.Fields
	ok          bool         // the draft has no problem
}

type fieldValue struct {
	name  string
	texts []string
}

type flagValue struct {
	index int // of the flag in Spec.Fields
	texts []string
}

// The method get returns the strings of a field that is not a flag of a copy. If the draft does not
// set the field, get returns nil.
func (d *draft) get(name string) []string {
	for _, v := range d.values {
		if v.name == name {
			return v.texts
		}
	}
	return nil
}

// The method draft parses a job, or the defaults of the job file, into a draft.
func (l *loader) draft(n *node, field place) *draft {
	d := &draft{node: n}
	before := len(l.problems)
	l.object(n, field, l.known, func(m member, field place) { l.field(d, m, field) })
	slices.SortFunc(d.flags, func(a, b flagValue) int { return a.index - b.index })
	d.ok = len(l.problems) == before
	return d
}

// The method field parses a field of a job or of the defaults.
func (l *loader) field(d *draft, m member, field place) {
	switch m.name {
	case "name":
		if field.base == "defaults" {
			l.bad(m.offset, field, "defaults cannot have a name: each job needs its own")
			return
		}
		l.text(d, m, field)
		if name := d.get("name"); name != nil && (name[0] == "" || len(name[0]) > 1000) {
			l.bad(m.value.offset, field, "a name must have 1 to 1000 bytes")
		}
	case "source", "target", "host":
		l.text(d, m, field)
	case "labels":
		d.labels = l.labels(m.value, field)
	case "before", "after":
		texts := l.texts(m, field)
		if texts != nil && (len(texts) == 0 || texts[0] == "") {
			l.bad(m.value.offset, field, "want an array of strings: a program, and then its arguments")
		}
		d.values = append(d.values, fieldValue{m.name, texts})
	case "hook_timeout":
		l.text(d, m, field)
		if v := d.get(m.name); v != nil {
			t, err := time.ParseDuration(v[0])
			if err != nil || t <= 0 {
				l.bad(m.value.offset, field, "%q: want a duration such as 90s or 15m", v[0])
			}
			d.hookTimeout = t
		}
	default:
		l.flag(d, m, field)
	}
}

func (l *loader) text(d *draft, m member, field place) {
	if l.want(m.value, field, "a string", kindString) && l.printable(m.value, field) {
		d.values = append(d.values, fieldValue{m.name, []string{m.value.text}})
	}
}

// The method printable reports whether the string n has no zero byte. If the string has a zero
// byte, which no path, name or flag can contain, the method records a problem.
func (l *loader) printable(n *node, field place) bool {
	if strings.Contains(n.text, "\x00") {
		l.bad(n.offset, field, "the text contains a zero byte")
		return false
	}
	return true
}

// The method texts returns the strings of an array, or nil if the value is no array.
func (l *loader) texts(m member, field place) []string {
	if !l.want(m.value, field, "an array of strings", kindArray) {
		return nil
	}
	texts := []string{}
	for i, item := range m.value.items {
		at := field.element(i)
		if l.want(item, at, "a string", kindString) && l.printable(item, at) {
			texts = append(texts, item.text)
		}
	}
	return texts
}

func (l *loader) labels(n *node, field place) map[string]string {
	labels := map[string]string{}
	l.object(n, field, nil, func(m member, field place) {
		if l.want(m.value, field, "a string", kindString) {
			labels[m.name] = m.value.text
		}
	})
	return labels
}

// The method flag parses a field that stands for a flag of a copy.
func (l *loader) flag(d *draft, m member, field place) {
	index, n := l.fields[m.name], m.value
	f := &l.spec.Fields[index]
	give := func(texts []string) { d.flags = append(d.flags, flagValue{index, texts}) }
	ok := false
	switch f.Type {
	case Boolean:
		ok = l.want(n, field, "true or false", kindBoolean)
	case Integer:
		ok = l.want(n, field, "a whole number", kindNumber)
	case Text:
		ok = l.want(n, field, "a string", kindString)
	case IntOrText:
		ok = l.want(n, field, "a whole number or a string", kindNumber, kindString)
	case BoolOrText:
		ok = l.want(n, field, "true, false or a string", kindBoolean, kindString)
	case Array:
		texts := l.texts(m, field)
		for i, text := range texts {
			l.check(f, n.items[min(i, len(n.items)-1)].offset, field.element(i), text)
		}
		if texts != nil {
			give(texts)
		}
		return
	}
	if !ok || !l.printable(n, field) {
		return
	}
	if n.kind == kindNumber && strings.ContainsAny(n.text, ".eE") {
		l.bad(n.offset, field, "%.40s: want a whole number", n.text)
		return
	}
	give([]string{n.text})
	if n.kind == kindString && f.Secret {
		l.secret(n, field)
		return
	}
	if n.kind == kindString && len(f.Enum) > 0 {
		if !slices.Contains(f.Enum, n.text) {
			l.bad(n.offset, field, "%.80q: want one of %s", n.text, strings.Join(f.Enum, ", "))
		}
		return
	}
	if n.kind == kindString && n.text == "" {
		l.bad(n.offset, field, "the text is empty: leave the field out")
		return
	}
	if n.kind != kindBoolean {
		l.check(f, n.offset, field, n.text)
	}
}

func (l *loader) check(f *Field, at int, field place, text string) {
	if f.Check == nil {
		return
	}
	if err := f.Check(text); err != nil {
		l.bad(at, field, "%v", err)
	}
}

// The method secret checks the value of a secret flag. Its messages never show the value.
func (l *loader) secret(n *node, field place) {
	switch {
	case strings.HasPrefix(n.text, "-"):
		l.bad(n.offset, field, "a job cannot read a secret from the terminal (-) or from a file descriptor (-FD): want +FILE, a file whose first line is the secret")
	case n.text == "+":
		l.bad(n.offset, field, "want the name of a file after +")
	case !strings.HasPrefix(n.text, "+"):
		l.warnings = append(l.warnings, field.String()+": the secret is in plain text, so everyone who can read the job file can read it; +FILE names a file that holds the secret")
	}
}

func (l *loader) limits(n *node, limits *Limits) {
	l.object(n, placeOf("limits"), newNameSet(names(limitFields)), func(m member, field place) {
		v := m.value
		count := func(into *int, least, most int) {
			if !l.want(v, field, "a whole number", kindNumber) {
				return
			}
			i, err := strconv.Atoi(v.text)
			if err != nil || i < least || i > most {
				l.bad(v.offset, field, "%.40s: want %d to %d", v.text, least, most)
			}
			*into = i
		}
		size := func(into *int64) {
			if !l.want(v, field, "a size: a whole number or a string", kindNumber, kindString) {
				return
			}
			i, err := bytesize.Parse(strings.TrimSuffix(v.text, "/s"))
			if err == nil && i == 0 {
				err = fmt.Errorf("want more than 0, because no job can run with the limit 0")
			}
			if err != nil {
				l.bad(v.offset, field, "%.200v", err)
			}
			*into = i
		}
		const many = 1 << 20
		switch m.name {
		case "total":
			count(&limits.Total, 1, 1000)
		case "per_server":
			count(&limits.PerServer, 1, many)
		case "per_host":
			count(&limits.PerHost, 1, many)
		case "connections":
			count(&limits.Connections, 1, many)
		case "rounds":
			count(&limits.Rounds, 0, 100)
		case "nfc_buffer":
			size(&limits.NFCBuffer)
		case "rate":
			size(&limits.Rate)
		}
	})
}
