// Package batch runs the jobs of a job file. [Load] reads and checks the file, [OpenStore]
// opens the state file, and [Run] runs the jobs within [Limits] and returns a [Report]. With
// the state file a later run can continue a batch, however the batch ended.
//
// The package does not copy by itself: the caller's [Spec] describes the flags of a copy, and
// the caller's [Runner] does the work of each job. The section "run: job files" of docs/cli.md
// is the contract for the files.
package batch

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// File is the content of a job file that has no mistakes.
type File struct {
	Jobs            []*Job   // at least one
	Limits          Limits   // as the file has them: see Limits.WithDefaults
	ContinueOnError bool     // other jobs start after one has failed
	Warnings        []string // to be shown to the user
}

// Job is one copy of a batch. If the job file does not set a field in the job, the field has
// the value in the defaults of the file.
type Job struct {
	Index       int           // in the file, from 0
	Name        string        // unique in the file
	Source      string        // an address; a path is absolute
	Target      string        // an address; a path is absolute
	Host        string        // the ESXi host; "": unknown
	Before      []string      // a program and its arguments, run before the copy; nil: none
	After       []string      // a program and its arguments, run after the copy; nil: none
	HookTimeout time.Duration // limit for each of the two
	Values      []Value       // the flags that the job sets, in the order of Spec.Fields

	labels, defaultLabels map[string]string
}

// Value is the value that a job sets for a flag.
type Value struct {
	Field *Field
	Texts []string // one, except for an Array
}

// Labels returns the labels of the job, and those labels of the defaults that the job does not
// replace. The caller may change the map, which is never nil.
func (j *Job) Labels() map[string]string {
	all := make(map[string]string, len(j.labels)+len(j.defaultLabels))
	maps.Copy(all, j.defaultLabels)
	maps.Copy(all, j.labels)
	return all
}

// Text returns the value of the flag with the given name, or "" if the job does not set it.
func (j *Job) Text(name string) string {
	for _, v := range j.Values {
		if v.Field.Name == name && len(v.Texts) > 0 {
			return v.Texts[0]
		}
	}
	return ""
}

// backing returns the path of the target's backing disk, or "" if the target is not an overlay.
// A relative path starts from the folder of the target. The path is not cleaned, because ".."
// after a symbolic link must stay.
func (j *Job) backing() string {
	name := j.Text("backing")
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return j.Target[:strings.LastIndexByte(j.Target, '/')+1] + name
}

// Server returns the server that the source is on, or "" for a source on this machine.
func (j *Job) Server() string { return j.Text("server") }

// Demand returns how much a job that copies one disk counts against the limits.
func (j *Job) Demand() Demand { return Demand{Disks: 1, Server: j.Server(), Host: j.Host} }

// HostKey identifies the host whose memory and connections a job uses: the ESXi
// host, or the server if the host is unknown. It is "" for a source on this machine.
func (j *Job) HostKey() string {
	if j.Host != "" {
		return "host " + j.Host
	}
	if s := j.Server(); s != "" {
		return "server " + s
	}
	return ""
}

// Fingerprint returns a hash of all that decides what is in the target of the job: the source,
// the target and the flags, except flags that are secret or only tune the copy.
func (j *Job) Fingerprint() string {
	words := []string{j.Source, j.Target}
	for _, v := range j.Values {
		if !v.Field.Secret && !v.Field.Tuning {
			words = append(append(words, v.Field.Name), v.Texts...)
		}
	}
	text, err := json.Marshal(words)
	if err != nil {
		panic(err) // strings can always be marshalled
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:16])
}

// Limits bound the work that is done at the same time. A field that is 0 stands for the default
// in its comment, or for no limit if its comment has no default.
type Limits struct {
	Total       int   // number of disks; 0: 4
	PerServer   int   // number of disks of each server
	PerHost     int   // number of disks of each ESXi host
	NFCBuffer   int64 // bytes that all connections to a host reserve there; 0: 32 MiB
	Connections int   // number of connections to each host; 0: 48
	Rate        int64 // bytes per second, of all jobs together
	Rounds      int   // how often jobs with a transient failure are tried again at the end
}

// Defaults of limits. An ESXi host has 48 MB of memory for NFC, the protocol that reads disks (96
// MB from vSphere 8). Through vCenter it allows 52 connections (VMware's programming guide, "NFC
// Session Limits and Timeouts"). The defaults leave some of the memory and of the connections to
// other programs.
const (
	DefaultTotal       = 4
	DefaultNFCBuffer   = 32 << 20
	DefaultConnections = 48
	// DefaultRounds is the value of Limits.Rounds for a job file that does not set it.
	DefaultRounds      = 2
	defaultHookTimeout = time.Hour
)

// WithDefaults returns l with the defaults for the fields that are 0.
func (l Limits) WithDefaults() Limits {
	l.Total = cmp.Or(l.Total, DefaultTotal)
	l.NFCBuffer = cmp.Or(l.NFCBuffer, DefaultNFCBuffer)
	l.Connections = cmp.Or(l.Connections, DefaultConnections)
	return l
}

// Type says which JSON values a field of a job accepts.
type Type int

// These are the types of the fields.
const (
	Boolean    Type = iota
	Integer         // a whole number
	Text            // a string
	IntOrText       // for sizes: 65536 or "64KiB"
	BoolOrText      // for a flag whose value may be left out
	Array           // of strings
)

// Field describes a field of job files in which a job can set a flag of a copy.
type Field struct {
	Name string // in the job file
	Type Type
	Enum []string // the strings that are allowed; nil: all
	Help string
	// Pattern is a regular expression that strings must match, and Least is the smallest
	// number. Only the JSON Schema uses them. The schema may allow values that Check refuses.
	Pattern string
	Least   int

	Path   bool // the value is a path, relative to the folder of the job file
	Secret bool // the value is a secret, or +FILE; messages never show it
	Tuning bool // the value does not change what the target holds
	// Check returns an error if the text is not a valid value of the field. If Check is nil,
	// every value is valid.
	Check func(text string) error
}

// Spec describes to Load which flags a copy has and how they are checked.
type Spec struct {
	Fields []Field // the flags
	// SourcePath and TargetPath report whether an address is a path on this machine.
	SourcePath, TargetPath func(address string) bool
	// Files returns names that identify the local file at an address. Two addresses of the same
	// file have a common name, whatever links lead to it. If the address is not that of a local
	// file, the result is nil. Load uses the names to find jobs that write the same file.
	Files func(address string) []string
	// Check returns an error if the fields of a job do not fit together. It is called only if
	// each field is valid by itself. If Check is nil, Load does not check how the fields fit
	// together.
	Check func(*Job) error
	// Load calls Progress from time to time, to show how far it is. done is the number of steps
	// that are done, and all is the number of steps in total. Progress may be nil.
	Progress func(done, all int)
}

// Shard returns the shard, from 0 to n-1, that the job with this name belongs to. The shard is the
// first 32 bits of the SHA-256 of the name, as a big-endian number, modulo n. It depends on nothing
// but the name and n, so all machines agree.
func Shard(name string, n int) int {
	sum := sha256.Sum256([]byte(name))
	return int(uint64(binary.BigEndian.Uint32(sum[:])) % uint64(n))
}

// ParseShard parses a text I/N, which selects shard I of N. Shards are counted from 0.
func ParseShard(s string) (i, n int, err error) {
	is, ns, ok := strings.Cut(s, "/")
	i, errI := strconv.Atoi(is)
	n, errN := strconv.Atoi(ns)
	if !ok || errI != nil || errN != nil || n < 1 || i < 0 || i >= n {
		return 0, 0, fmt.Errorf("%q: want I/N: the number of the shard, counted from 0, and how many shards there are, such as 0/4", s)
	}
	return i, n, nil
}

// Selection says which jobs of a file are selected. The zero value selects all.
type Selection struct {
	Names         []string          // empty: all names
	Labels        map[string]string // a selected job has all of these labels
	Shard, Shards int               // Shards 0: all shards
}

// Select returns the selected jobs in the order of the file. It takes the jobs with the given
// names, or all jobs if no names are given. Then it removes the jobs that lack one of the given
// labels. It returns an error if a given name is not the name of a job, or if no job is left. If a
// shard is given, Select then removes the jobs of other shards. The result may be empty after that,
// which is not an error.
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
	if len(jobs) == 0 && len(s.Names) > 0 {
		return nil, errors.New("none of the jobs with the given names has all given labels")
	}
	if len(jobs) == 0 {
		return nil, fmt.Errorf("none of the %d jobs of the file has all given labels", len(f.Jobs))
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
