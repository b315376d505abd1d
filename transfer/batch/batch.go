// Package batch copies many disks by a job file: it reads and checks the file,
// runs the jobs within limits, keeps a state file by which a batch goes on
// after any end, and reports. How one disk is copied is its caller's: batch
// knows of a copy's flags only what Spec says. docs/cli.md, "run: job files",
// is the contract.
package batch

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// File is a job file, checked.
type File struct {
	Jobs            []*Job // at least one
	Limits          Limits
	ContinueOnError bool
	Warnings        []string // for the user
}

// Job is one copy of a batch, with the defaults filled in.
type Job struct {
	Index       int      // in the file, from 0
	Name        string   // unique in the file
	Source      string   // a path is absolute
	Target      string   // likewise
	Host        string   // the ESXi host; "": not known
	Before      []string // commands: a program and its arguments; nil: none
	After       []string
	HookTimeout time.Duration // of each command
	Values      []Value       // the flags that are given, in the order of Spec.Fields

	labels, defaultLabels map[string]string
}

// Value is a flag of a job.
type Value struct {
	Field *Field
	Texts []string // one, but of an Array
}

// Labels returns the labels of the job and of the defaults: a map of the caller's
// own, not nil.
func (j *Job) Labels() map[string]string {
	all := make(map[string]string, len(j.labels)+len(j.defaultLabels))
	maps.Copy(all, j.defaultLabels)
	maps.Copy(all, j.labels)
	return all
}

// Text returns the value of a flag, "" where it is not given.
func (j *Job) Text(name string) string {
	for _, v := range j.Values {
		if v.Field.Name == name && len(v.Texts) > 0 {
			return v.Texts[0]
		}
	}
	return ""
}

// backing is the path of the disk that the target is an overlay of, "" where it is
// none: a relative one starts from the folder of the target. It is not cleaned.
func (j *Job) backing() string {
	name := j.Text("backing")
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return j.Target[:strings.LastIndexByte(j.Target, '/')+1] + name
}

// Server is where the source lies, "" for this machine.
func (j *Job) Server() string { return j.Text("server") }

// Demand returns what a job that copies one disk counts against the limits.
func (j *Job) Demand() Demand { return Demand{Disks: 1, Server: j.Server(), Host: j.Host} }

// HostKey names what the limits of a host count for: the host, or, where it is
// not known, the server. "" is neither.
func (j *Job) HostKey() string {
	if j.Host != "" {
		return "host " + j.Host
	}
	if s := j.Server(); s != "" {
		return "server " + s
	}
	return ""
}

// Fingerprint tells jobs apart that make different targets: it covers source,
// target and the flags, but those that are secret or only tune.
func (j *Job) Fingerprint() string {
	words := []string{j.Source, j.Target}
	for _, v := range j.Values {
		if !v.Field.Secret && !v.Field.Tuning {
			words = append(append(words, v.Field.Name), v.Texts...)
		}
	}
	text, err := json.Marshal(words)
	if err != nil {
		panic(err) // strings can be marshalled
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:16])
}

// Limits bound what runs at once. Zero fields do not limit, but where a default
// is named.
type Limits struct {
	Total       int   // disks; 0: 4
	PerServer   int   // disks
	PerHost     int   // disks
	NFCBuffer   int64 // bytes that connections reserve on each host; 0: 32 MiB
	Connections int   // to each host; 0: 48
	Rate        int64 // bytes a second, of all
	Rounds      int   // more tries, at the end, of what may pass later; Load sets DefaultRounds
}

// Defaults of limits. A host has 48 MB of NFC memory (96 from vSphere 8), and
// 52 connections through vCenter: VMware's programming guide, "NFC Session
// Limits and Timeouts". What others do there needs some too.
const (
	DefaultTotal       = 4
	DefaultNFCBuffer   = 32 << 20
	DefaultConnections = 48
	// DefaultRounds is how often a job that may pass later is tried again.
	DefaultRounds      = 2
	defaultHookTimeout = time.Hour
)

// WithDefaults returns l with the defaults for what is not set.
func (l Limits) WithDefaults() Limits {
	l.Total = cmp.Or(l.Total, DefaultTotal)
	l.NFCBuffer = cmp.Or(l.NFCBuffer, DefaultNFCBuffer)
	l.Connections = cmp.Or(l.Connections, DefaultConnections)
	return l
}

// Type is what JSON a field takes.
type Type int

// The types of fields.
const (
	Boolean    Type = iota
	Integer         // a whole number
	Text            // a string
	IntOrText       // as sizes: 65536 or "64KiB"
	BoolOrText      // a flag whose value may be left out
	Array           // of strings
)

// Field is a flag of a copy, as a field of a job.
type Field struct {
	Name string // as in the job file
	Type Type
	Enum []string // the strings that are allowed; nil: any
	Help string
	// For the schema alone, which may take what Check refuses.
	Pattern string // of its text; "": any
	Least   int    // of its number

	Path   bool // a path, relative to the folder of the job file
	Secret bool // a value or +FILE, never shown
	Tuning bool // does not decide what the target holds
	// Check says what is wrong with a value; nil: nothing ever.
	Check func(text string) error
}

// Spec is what a batch needs to know of copies.
type Spec struct {
	Fields []Field
	// SourcePath and TargetPath say whether an address is a path of this machine.
	SourcePath, TargetPath func(address string) bool
	// Files are the names under which a local address is known, to find out
	// whether two jobs meet in one file; nil: it is none.
	Files func(address string) []string
	// Check returns what is wrong with a job as a whole, once its fields are valid.
	// If Check is nil, jobs are not checked as a whole.
	Check func(*Job) error
	// Progress is called now and then with how much of the work of loading is
	// done; nil: nobody wants to know.
	Progress func(done, all int)
}

// Shard returns in which of n shards a job is: the first 32 bits of the SHA-256
// of its name, as a big-endian number, modulo n. It depends on nothing else.
func Shard(name string, n int) int {
	sum := sha256.Sum256([]byte(name))
	return int(uint64(binary.BigEndian.Uint32(sum[:])) % uint64(n))
}

// ParseShard reads I/N.
func ParseShard(s string) (i, n int, err error) {
	is, ns, ok := strings.Cut(s, "/")
	i, errI := strconv.Atoi(is)
	n, errN := strconv.Atoi(ns)
	if !ok || errI != nil || errN != nil || n < 1 || i < 0 || i >= n {
		return 0, 0, fmt.Errorf("%q: want I/N, the shard and how many there are, as 0/4 to 3/4", s)
	}
	return i, n, nil
}

// Selection picks jobs of a file. The zero value picks all.
type Selection struct {
	Names         []string          // empty: any
	Labels        map[string]string // all of them must be there
	Shard, Shards int               // Shards 0: not sharded
}

// Select returns the jobs that are picked, in their order. It is an error where
// a name is no job's, or where names and labels pick nothing.
func (f *File) Select(s Selection) ([]*Job, error) {
	missing := map[string]bool{}
	for _, name := range s.Names {
		missing[name] = true
	}
	picked := maps.Clone(missing)
	for _, j := range f.Jobs {
		delete(missing, j.Name)
	}
	for _, name := range s.Names {
		if missing[name] {
			return nil, fmt.Errorf("no job is called %q", name)
		}
	}
	var jobs []*Job
	for _, j := range f.Jobs {
		if (len(s.Names) == 0 || picked[j.Name]) && j.hasLabels(s.Labels) {
			jobs = append(jobs, j)
		}
	}
	if len(jobs) == 0 {
		return nil, fmt.Errorf("none of %d jobs has all of these names and labels", len(f.Jobs))
	}
	if s.Shards > 0 {
		jobs = slices.DeleteFunc(jobs, func(j *Job) bool { return Shard(j.Name, s.Shards) != s.Shard })
	}
	return jobs, nil
}

func (j *Job) hasLabels(labels map[string]string) bool {
	for key, want := range labels {
		have, ok := j.labels[key]
		if !ok {
			have, ok = j.defaultLabels[key]
		}
		if !ok || have != want {
			return false
		}
	}
	return true
}
