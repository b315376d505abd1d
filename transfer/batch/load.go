package batch

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"vddkcp/internal/bytesize"
	"vddkcp/internal/nearest"
)

// maxName is how much of a field's name is shown, in bytes.
const maxName = 64

// maxShown bounds how many problems an error lists.
const maxShown = 200

// problem is a mistake in a job file.
type problem struct {
	offset  int    // in the file
	field   string // "jobs[3].compress"; "": the file as a whole
	message string
}

// FileError is all that is wrong with a job file.
type FileError struct {
	Name     string
	Problems []Problem // in the order of the file
}

// Problem is a mistake in a job file. Line and column count from 1, the latter
// characters.
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

// Lines returns the lines of the error's text: one for each problem, up to a limit.
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

// Load reads a job file, which messages call name; dir, absolute, is where its
// relative paths start. What is wrong with it is a *FileError.
func Load(r io.Reader, name, dir string, spec *Spec) (*File, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	l := &loader{dir: dir, spec: spec, fields: map[string]*Field{}, known: names(jobFields)}
	for i := range spec.Fields {
		l.fields[spec.Fields[i].Name] = &spec.Fields[i]
		l.known = append(l.known, spec.Fields[i].Name)
	}
	file := new(File)
	if len(text) > maxFile {
		l.problems = append(l.problems, problem{message: fmt.Sprintf("longer than %s, the most that a job file may have", bytesize.Format(maxFile))})
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
	for _, p := range l.problems {
		line, column := at.of(p.offset)
		e.Problems = append(e.Problems, Problem{line, column, p.field, p.message})
	}
	return nil, e
}

type loader struct {
	dir      string
	spec     *Spec
	fields   map[string]*Field
	known    []string // the fields of a job
	problems []problem
	warnings []string
}

func (l *loader) bad(at int, field, format string, args ...any) {
	l.problems = append(l.problems, problem{at, field, fmt.Sprintf(format, args...)})
}

// want reports whether n is of one of the kinds, and else that it is not.
func (l *loader) want(n *node, field, wanted string, kinds ...kind) bool {
	if slices.Contains(kinds, n.kind) {
		return true
	}
	l.bad(n.offset, field, "want %s, found %s", wanted, n.kind.named())
	return false
}

// object calls each for every member of an object, but for those whose name came
// before or is not among known.
func (l *loader) object(n *node, field string, known []string, each func(m member, field string)) {
	prefix := ""
	if field != "" {
		prefix = field + "."
	}
	if !l.want(n, field, "an object", kindObject) {
		return
	}
	seen := map[string]bool{}
	for _, m := range n.members {
		switch {
		case seen[m.name]:
			l.bad(m.offset, prefix+quoted(m.name), "is there twice")
		case known != nil && !slices.Contains(known, m.name):
			l.unknown(m, prefix, known)
		default:
			each(m, prefix+quoted(m.name))
		}
		seen[m.name] = true
	}
}

func (l *loader) unknown(m member, prefix string, known []string) {
	field := prefix + quoted(m.name)
	if reason := notOfAJob(m.name); reason != "" && strings.HasPrefix(prefix, "jobs[") || reason != "" && prefix == "defaults." {
		l.bad(m.offset, field, "not a field of a job: %s", reason)
		return
	}
	if len(m.name) > maxName {
		l.bad(m.offset, field, "unknown field")
		return
	}
	meant := nearest.Of(strings.ReplaceAll(strings.ToLower(m.name), "-", "_"), known)
	l.bad(m.offset, field, "unknown field; did you mean %q?", meant)
}

// notOfAJob says why a flag of a copy is none of a job.
func notOfAJob(name string) string {
	switch {
	case name == "progress" || name == "report" || name == "resume":
		return fmt.Sprintf("it is --%s of the whole run", name)
	case name == "dry_run":
		return "--check of the run looks at all jobs"
	case strings.HasPrefix(name, "log_") || name == "verbose":
		return "the run logs for all jobs; see --log-dir"
	}
	return ""
}

// quoted returns a name as it is where it could be a field's, else in quotes.
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

func (l *loader) file(root *node) *File {
	f := &File{ContinueOnError: true}
	var jobs *node
	defaults := newDraft()
	version := false
	l.object(root, "", names(topFields), func(m member, field string) {
		switch m.name {
		case "version":
			version = true
			if m.value.kind != kindNumber || m.value.text != "1" {
				l.bad(m.value.offset, field, "want 1, the version of job files that there is")
			}
		case "continue_on_error":
			if l.want(m.value, field, "a boolean", kindBoolean) {
				f.ContinueOnError = m.value.text == "true"
			}
		case "limits":
			l.limits(m.value, &f.Limits)
		case "defaults":
			defaults = l.draft(m.value, "defaults", -1)
		case "jobs":
			if l.want(m.value, field, "an array", kindArray) {
				jobs = m.value
			}
		}
	})
	if root.kind == kindObject && !version {
		l.bad(root.offset, "version", `missing: want "version": 1`)
	}
	switch {
	case root.kind != kindObject:
	case jobs == nil && !slices.ContainsFunc(root.members, func(m member) bool { return m.name == "jobs" }):
		l.bad(root.offset, "jobs", "missing: want an array of jobs")
	case jobs != nil && len(jobs.items) == 0:
		l.bad(jobs.offset, "jobs", "no job: want at least one")
	case jobs != nil:
		l.jobs(jobs, defaults, f)
	}
	return f
}

// draft is a job as the file has it.
type draft struct {
	node        *node
	labels      map[string]string
	hookTimeout time.Duration
	values      map[string][]string
	places      map[string]int // of the values of fields
	ok          bool           // no problem in it
}

func newDraft() *draft {
	return &draft{values: map[string][]string{}, places: map[string]int{}, ok: true}
}

// draft reads a job or, with index -1, the defaults.
func (l *loader) draft(n *node, field string, index int) *draft {
	d := newDraft()
	d.node = n
	before := len(l.problems)
	l.object(n, field, l.known, func(m member, field string) {
		d.places[m.name] = m.value.offset
		switch m.name {
		case "name":
			if index < 0 {
				l.bad(m.offset, field, "a name is one job's")
				return
			}
			l.text(d, m, field)
			if name := d.values["name"]; name != nil && (name[0] == "" || len(name[0]) > 1000) {
				l.bad(m.value.offset, field, "want 1 to 1000 bytes")
			}
		case "source", "target", "host":
			l.text(d, m, field)
		case "labels":
			d.labels = l.labels(m.value, field)
		case "before", "after":
			l.texts(d, m, field)
			if v := d.values[m.name]; v != nil && (len(v) == 0 || v[0] == "") {
				l.bad(m.value.offset, field, "want a program and its arguments")
			}
		case "hook_timeout":
			l.text(d, m, field)
			if v := d.values[m.name]; v != nil {
				t, err := time.ParseDuration(v[0])
				if err != nil || t <= 0 {
					l.bad(m.value.offset, field, "%q: want a time, as 90s or 15m", v[0])
				}
				d.hookTimeout = t
			}
		default:
			l.flag(d, m, field)
		}
	})
	d.ok = len(l.problems) == before
	return d
}

func (l *loader) text(d *draft, m member, field string) {
	if l.want(m.value, field, "a string", kindString) && l.printable(m.value, field) {
		d.values[m.name] = []string{m.value.text}
	}
}

// printable refuses what no path, name or flag can have.
func (l *loader) printable(n *node, field string) bool {
	if strings.Contains(n.text, "\x00") {
		l.bad(n.offset, field, "it has a character of code 0")
		return false
	}
	return true
}

func (l *loader) texts(d *draft, m member, field string) {
	if !l.want(m.value, field, "an array of strings", kindArray) {
		return
	}
	texts := []string{}
	for i, item := range m.value.items {
		at := fmt.Sprintf("%s[%d]", field, i)
		if l.want(item, at, "a string", kindString) && l.printable(item, at) {
			texts = append(texts, item.text)
		}
	}
	d.values[m.name] = texts
}

func (l *loader) labels(n *node, field string) map[string]string {
	labels := map[string]string{}
	l.object(n, field, nil, func(m member, field string) {
		if l.want(m.value, field, "a string", kindString) {
			labels[m.name] = m.value.text
		}
	})
	return labels
}

// flag reads a field that is a flag of a copy.
func (l *loader) flag(d *draft, m member, field string) {
	f, n := l.fields[m.name], m.value
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
		l.texts(d, m, field)
		for i, text := range d.values[m.name] {
			l.check(f, n.items[min(i, len(n.items)-1)].offset, fmt.Sprintf("%s[%d]", field, i), text)
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
	d.values[m.name] = []string{n.text}
	if n.kind == kindString && f.Secret {
		l.secret(f, n, field)
		return
	}
	if n.kind == kindString && len(f.Enum) > 0 {
		if !slices.Contains(f.Enum, n.text) {
			l.bad(n.offset, field, "%.80q: want one of %s", n.text, strings.Join(f.Enum, ", "))
		}
		return
	}
	if n.kind == kindString && n.text == "" {
		l.bad(n.offset, field, "empty: leave the field out")
		return
	}
	if n.kind != kindBoolean {
		l.check(f, n.offset, field, n.text)
	}
}

func (l *loader) check(f *Field, at int, field, text string) {
	if f.Check == nil {
		return
	}
	if err := f.Check(text); err != nil {
		l.bad(at, field, "%v", err)
	}
}

// secret never shows the value.
func (l *loader) secret(f *Field, n *node, field string) {
	switch {
	case strings.HasPrefix(n.text, "-"):
		l.bad(n.offset, field, "- and -FD ask a person or another program: want +FILE, the first line of a file")
	case n.text == "+":
		l.bad(n.offset, field, "want the name of a file after +")
	case !strings.HasPrefix(n.text, "+"):
		l.warnings = append(l.warnings, field+": in plain text: whoever can read the job file has it; +FILE names a file that holds it")
	}
}

func (l *loader) limits(n *node, limits *Limits) {
	l.object(n, "limits", names(limitFields), func(m member, field string) {
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
				err = fmt.Errorf("0: nothing could ever run")
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

// jobs reads the jobs, and finds those that are in each other's way.
func (l *loader) jobs(n *node, defaults *draft, f *File) {
	drafts := make([]*draft, len(n.items))
	byName := map[string]int{}
	type claim struct{ job int }
	targets := map[string]claim{}
	for i, item := range n.items {
		field := fmt.Sprintf("jobs[%d]", i)
		d := l.draft(item, field, i)
		drafts[i] = d
		if item.kind != kindObject {
			f.Jobs = append(f.Jobs, nil)
			continue
		}
		j := l.merge(i, d, defaults)
		f.Jobs = append(f.Jobs, j)
		at := func(name string) int {
			if at, ok := d.places[name]; ok {
				return at
			}
			return item.offset
		}
		for name, value := range map[string]string{"source": j.Source, "target": j.Target} {
			_, here := d.places[name]
			_, there := defaults.places[name]
			if value == "" && (!here && !there || here && d.ok) {
				l.bad(at(name), field+"."+name, "missing")
				d.ok = false
			}
		}
		if first, ok := byName[j.Name]; ok {
			l.bad(at("name"), field+".name", "%.80q is the name of jobs[%d] too", j.Name, first)
		} else {
			byName[j.Name] = i
		}
		for _, file := range l.files(j.Target) {
			if first, ok := targets[file]; ok && first.job != i {
				l.bad(at("target"), field+".target", "%.200q is the target of jobs[%d] too", j.Target, first.job)
				break
			}
			targets[file] = claim{i}
		}
	}
	for i, j := range f.Jobs {
		if j == nil {
			continue
		}
		d := drafts[i]
		for _, file := range l.files(j.Source) {
			if writer, ok := targets[file]; ok && writer.job != i {
				at, ok := d.places["source"]
				if !ok {
					at = d.node.offset
				}
				l.bad(at, fmt.Sprintf("jobs[%d].source", i), "%.200q is the target of jobs[%d], which would be written meanwhile", j.Source, writer.job)
				break
			}
		}
		if d.ok && defaults.ok && l.spec.Job != nil {
			data, err := l.spec.Job(j)
			if err != nil {
				l.badJob(i, d, defaults, err)
			}
			j.Data = data
		}
	}
}

// badJob puts what is wrong with a job as a whole where it is: an error that begins
// with a flag's name is of that field.
func (l *loader) badJob(i int, d, defaults *draft, err error) {
	flag, message, ok := strings.Cut(err.Error(), ": ")
	flag, isFlag := strings.CutPrefix(flag, "--")
	name := strings.ReplaceAll(flag, "-", "_")
	if ok && isFlag {
		if at, ok := d.places[name]; ok {
			l.bad(at, fmt.Sprintf("jobs[%d].%s", i, name), "%s", message)
			return
		}
		if at, ok := defaults.places[name]; ok {
			l.bad(at, "defaults."+name, "%s (in jobs[%d])", message, i)
			return
		}
	}
	l.bad(d.node.offset, fmt.Sprintf("jobs[%d]", i), "%v", err)
}

func (l *loader) files(address string) []string {
	if l.spec.Files == nil || address == "" {
		return nil
	}
	return l.spec.Files(address)
}

// merge makes a job of a draft, over the defaults.
func (l *loader) merge(i int, d, defaults *draft) *Job {
	get := func(name string) []string {
		if v, ok := d.values[name]; ok {
			return v
		}
		return defaults.values[name]
	}
	first := func(name string) string {
		if v := get(name); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	j := &Job{
		Index: i, Name: cmp.Or(first("name"), strconv.Itoa(i)), Host: first("host"),
		Source: first("source"), Target: first("target"), Before: get("before"), After: get("after"),
		HookTimeout: cmp.Or(d.hookTimeout, defaults.hookTimeout, defaultHookTimeout),
	}
	if j.Source != "" && l.spec.SourcePath(j.Source) {
		j.Source = l.absolute(j.Source)
	}
	if j.Target != "" && l.spec.TargetPath(j.Target) {
		j.Target = l.absolute(j.Target)
	}
	if len(d.labels)+len(defaults.labels) > 0 {
		j.Labels = map[string]string{}
		maps.Copy(j.Labels, defaults.labels)
		maps.Copy(j.Labels, d.labels)
	}
	for k := range l.spec.Fields {
		f := &l.spec.Fields[k]
		texts := slices.Clone(get(f.Name))
		if texts == nil {
			continue
		}
		for n, text := range texts {
			name, inFile := strings.CutPrefix(text, "+")
			switch {
			case f.Secret && inFile && name != "":
				texts[n] = "+" + l.absolute(name)
			case f.Path:
				texts[n] = l.absolute(text)
			}
		}
		j.Values = append(j.Values, Value{f, texts})
	}
	return j
}

// absolute is a path of the job file. It is not cleaned: what is after .. may be
// a symbolic link.
func (l *loader) absolute(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return strings.TrimSuffix(l.dir, "/") + "/" + path
}
