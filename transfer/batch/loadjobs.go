package batch

import (
	"cmp"
	"hash/maphash"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// jobsLoader parses the jobs of a file one by one, and finds jobs that conflict with each
// other. It keeps little data of each job, because a file may have a million jobs.
type jobsLoader struct {
	*loader
	places   []int32 // offsets of the jobs in the file
	defaults *draft
	file     *File
	ok       []bool // for each job: no problem was found so far
	byName   map[string]int32
	// The map targets has the files that jobs write. A key is a hash of the name of a file, and the
	// value is the index of the job that writes this file. The names themselves would need more
	// memory than all other data of the jobs.
	targets map[uint64]int32
	seed    maphash.Seed
}

// jobDepth is the number of JSON values that enclose a job: the file's object and the array
// "jobs".
const jobDepth = 2

func (l *loader) jobs(n *node, defaults *draft, f *File) {
	count := len(n.unread)
	j := &jobsLoader{
		loader: l, places: n.unread, defaults: defaults, file: f, ok: make([]bool, count),
		byName: make(map[string]int32, count), targets: make(map[uint64]int32, 2*count), seed: maphash.MakeSeed(),
	}
	f.Jobs = make([]*Job, count)
	for i := range count {
		l.progress(i, 2*count)
		j.read(i)
	}
	for i := range count {
		l.progress(count+i, 2*count)
		if f.Jobs[i] != nil {
			j.check(i)
		}
	}
}

// The method node parses job i into a tree. The caller must not keep the tree, because the trees of
// all jobs together would need too much memory.
func (l *jobsLoader) node(i int) *node { return expand(l.content, int(l.places[i]), jobDepth) }

func placeOfJob(i int) place { return place{base: "jobs", index: i} }

// The method read parses job i. It records the name of the job and the files of its target, so that
// other jobs can be compared with them.
func (l *jobsLoader) read(i int) {
	d := l.draft(l.node(i), placeOfJob(i))
	l.ok[i] = d.ok
	if d.node.kind != kindObject {
		return
	}
	j := l.merge(i, d, l.defaults)
	l.file.Jobs[i] = j
	l.required(i, d, "source", j.Source)
	l.required(i, d, "target", j.Target)
	if first, ok := l.byName[j.Name]; ok {
		l.bad(l.offsetOf(d.node, "name"), placeOfJob(i).member("name"), "%.80q is also the name of jobs[%d]", j.Name, first)
	} else {
		l.byName[j.Name] = int32(i)
	}
	for _, file := range l.files(j.Target) {
		if first, ok := l.writer(file); ok && first != i {
			l.bad(l.offsetOf(d.node, "target"), placeOfJob(i).member("target"), "%.200q is also the target of jobs[%d]", j.Target, first)
			break
		}
		l.targets[maphash.String(l.seed, file)] = int32(i)
	}
}

// The method writer returns the index of the job that writes a file. The result ok is false if none
// of the jobs read so far writes it.
func (l *jobsLoader) writer(file string) (job int, ok bool) {
	i, ok := l.targets[maphash.String(l.seed, file)]
	return int(i), ok && slices.Contains(l.files(l.file.Jobs[i].Target), file)
}

// The method required records a problem if a required field, such as "source", has no value in the
// merged job. If neither the job nor the defaults have the field, the problem is always recorded.
//
// If the job has the field, the value is empty or has a wrong type. A wrong type is recorded
// already. To report no field twice, required records a problem only if no other problem of the job
// is known.
//
// If only the defaults have the field, required records nothing, because Spec.Check reports an
// empty value there.
func (l *jobsLoader) required(i int, d *draft, name, value string) {
	if value != "" {
		return
	}
	_, here := d.node.find(name)
	there := false
	if l.defaults.node != nil {
		_, there = l.defaults.node.find(name)
	}
	if !here && !there || here && d.ok {
		l.bad(l.offsetOf(d.node, name), placeOfJob(i).member(name), "missing")
		l.ok[i], d.ok = false, false
	}
}

// offsetOf returns where the value of a field begins in the file. If the job does not have the
// field, it returns where the job begins.
func (l *jobsLoader) offsetOf(job *node, name string) int {
	if m, ok := job.find(name); ok {
		return m.value.offset
	}
	return job.offset
}

// The method check looks for conflicts of job i with other jobs, and calls Spec.Check for the job.
func (l *jobsLoader) check(i int) {
	j := l.file.Jobs[i]
	for _, file := range l.files(j.Source) {
		if writer, ok := l.writer(file); ok && writer != i {
			l.bad(l.offsetOf(l.node(i), "source"), placeOfJob(i).member("source"), "%.200q is the target of jobs[%d], which may be written at the same time", j.Source, writer)
			break
		}
	}
	for _, file := range l.files(j.backing()) {
		if writer, ok := l.writer(file); ok && writer != i {
			l.bad(l.offsetOf(l.node(i), "backing"), placeOfJob(i).member("backing"), "%.200q is the target of jobs[%d], which may be written at the same time", j.Text("backing"), writer)
			break
		}
	}
	if l.ok[i] && l.defaults.ok && l.spec.Check != nil {
		if err := l.spec.Check(j); err != nil {
			l.badJob(i, err)
		}
	}
}

// badJob records an error of Spec.Check as a problem of job i. If the error begins with the
// name of a flag, such as "--digest: ", the problem belongs to the field of that flag.
func (l *jobsLoader) badJob(i int, err error) {
	job := l.node(i)
	flag, message, ok := strings.Cut(err.Error(), ": ")
	flag, isFlag := strings.CutPrefix(flag, "--")
	name := strings.ReplaceAll(flag, "-", "_")
	if ok && isFlag {
		if m, ok := job.find(name); ok {
			l.bad(m.value.offset, placeOfJob(i).member(name), "%s", message)
			return
		}
		if l.defaults.node != nil {
			if m, ok := l.defaults.node.find(name); ok {
				l.bad(m.value.offset, placeOf("defaults").member(name), "%s (in jobs[%d])", message, i)
				return
			}
		}
	}
	l.bad(job.offset, placeOfJob(i), "%v", err)
}

func (l *loader) files(address string) []string {
	if l.spec.Files == nil || address == "" {
		return nil
	}
	return l.spec.Files(address)
}

// The method progress calls Spec.Progress for every 256th step.
func (l *loader) progress(done, all int) {
	if l.spec.Progress != nil && done%256 == 0 {
		l.spec.Progress(done, all)
	}
}

// The method merge makes job i from the draft d and the defaults. Fields that d does not set come
// from the defaults.
func (l *loader) merge(i int, d, defaults *draft) *Job {
	get := func(name string) []string {
		if v := d.get(name); v != nil {
			return v
		}
		return defaults.get(name)
	}
	first := func(name string) string {
		if v := get(name); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	j := &Job{
		Index: i, Name: first("name"), Host: first("host"),
		Source: first("source"), Target: first("target"), Before: get("before"), After: get("after"),
		HookTimeout: cmp.Or(d.hookTimeout, defaults.hookTimeout, defaultHookTimeout),
		labels:      d.labels, defaultLabels: defaults.labels,
	}
	if j.Name == "" {
		j.Name = strconv.Itoa(i)
	}
	if j.Source != "" && l.spec.SourcePath(j.Source) {
		j.Source = l.absolute(j.Source)
	}
	if j.Target != "" && l.spec.TargetPath(j.Target) {
		j.Target = l.absolute(j.Target)
	}
	j.Values = make([]Value, 0, len(d.flags)+len(defaults.flags))
	// The flags of the draft and those of the defaults are both in the order of Spec.Fields, and
	// are merged in that order. If both have a flag, the merged job gets the value in the draft.
	ours, theirs := d.flags, defaults.flags
	for len(ours)+len(theirs) > 0 {
		var v flagValue
		switch {
		case len(theirs) == 0 || len(ours) > 0 && ours[0].index < theirs[0].index:
			v, ours = ours[0], ours[1:]
		case len(ours) == 0 || theirs[0].index < ours[0].index:
			v, theirs = theirs[0], theirs[1:]
		default:
			v, ours, theirs = ours[0], ours[1:], theirs[1:]
		}
		j.Values = append(j.Values, l.value(v))
	}
	return j
}

// The method value returns the value of a flag. Paths in the value are made absolute.
func (l *loader) value(v flagValue) Value {
	f := &l.spec.Fields[v.index]
	if !f.Path && !f.Secret {
		return Value{f, v.texts}
	}
	texts := make([]string, len(v.texts))
	for n, text := range v.texts {
		name, inFile := strings.CutPrefix(text, "+")
		switch {
		case f.Secret && inFile && name != "":
			texts[n] = "+" + l.absolute(name)
		case f.Path:
			texts[n] = l.absolute(text)
		default:
			texts[n] = text
		}
	}
	return Value{f, texts}
}

// The method absolute returns the absolute form of a path in the job file. It does not clean the
// path, because ".." after a symbolic link must stay.
func (l *loader) absolute(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return strings.TrimSuffix(l.dir, "/") + "/" + path
}
