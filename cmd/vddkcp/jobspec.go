package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/usage"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/digest"
)

// notJobFields are the flags of vddkcp copy that a job cannot set.
var notJobFields = []string{"progress", "report", "metrics", "resume", "dry-run", "nfc-trace"}

// decidingVDDK are the flags of VDDK that decide which disk is read. The other flags of
// VDDK only decide how the disk is read.
var decidingVDDK = []string{"server", "vm", "snapshot"}

// jobParser turns the fields of a job into the flags of a copy. It uses the parser of the
// command line, so that a field of a job accepts the same values as the flag that it sets.
type jobParser struct {
	parser      *kong.Kong
	environment secretEnvironment // secrets for all jobs
	config      *profile.Config
	files       fileNames
	// The field implied is the field server of jobs that do not set it, but whose server the
	// environment or a profile names. It differs from the field that a job sets only by being
	// another variable.
	implied batch.Field

	mu       sync.Mutex // guards the other fields
	line     struct{ copyCommand }
	defaults copyCommand           // the value of line when no flag is set
	flags    map[string]*kong.Flag // by the names of fields
}

func newJobParser(servers *servers) (*jobParser, error) {
	p := &jobParser{flags: map[string]*kong.Flag{}, files: fileNames{}, config: newConfig()}
	var err error
	p.parser, err = kong.New(&p.line, append(slices.Clone(textMappers), kong.NoDefaultHelp(), kong.Bind(&p.environment, servers))...)
	if err != nil {
		return nil, err
	}
	if _, err := p.parser.Parse([]string{"SRC", "DST"}); err != nil {
		return nil, usage.Wrap(aboutVariable(err)) // no other value than that of a variable can be wrong
	}
	p.defaults = p.line.copyCommand
	for _, flag := range p.parser.Model.Flags {
		p.flags[fieldName(flag)] = flag
	}
	return p, nil
}

// fieldName returns the name of the field by which a job sets the given flag.
func fieldName(flag *kong.Flag) string { return strings.ReplaceAll(flag.Name, "-", "_") }

// The method spec returns a description of the flags of vddkcp copy for package batch.
func (p *jobParser) spec() (*batch.Spec, error) {
	s := &batch.Spec{
		// SourcePath and TargetPath return false for an invalid address. The address is
		// then not made absolute, and the error message shows it as the user wrote it.
		SourcePath: func(a string) bool {
			source, err := address.Parse(a, address.Disk)
			return err == nil && !address.IsRemote(source)
		},
		TargetPath: func(a string) bool {
			target, _ := address.Parse(a, address.Target)
			_, ok := target.(address.Path)
			return ok
		},
		Files: p.files.of,
		Check: func(j *batch.Job) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			if err := p.set(j); err != nil {
				return err
			}
			return p.implyServer(j)
		},
	}
	for _, flag := range p.parser.Model.Flags {
		if slices.Contains(notJobFields, flag.Name) {
			continue
		}
		f, err := jobField(flag)
		if err != nil {
			return nil, err
		}
		s.Fields = append(s.Fields, f)
		if f.Name == "server" {
			p.implied = f
		}
	}
	return s, nil
}

// jobField describes the field by which a job sets the given flag.
func jobField(flag *kong.Flag) (batch.Field, error) {
	f := batch.Field{Name: fieldName(flag), Help: flag.Help}
	switch value := flag.Target.Interface().(type) {
	case bool:
		f.Type = batch.Boolean
	case int, portFlag:
		f.Type, f.Least = batch.Integer, 1
	case string, viaFlag:
		f.Type = batch.Text
	case patience:
		f.Type, f.Pattern = batch.Text, batch.TimePattern
	case nfcBuffers:
		f.Type, f.Pattern = batch.Text, "^[0-9]+[A-Za-z]*x[0-9]+$"
	case secretFlag:
		f.Type, f.Secret = batch.Text, true
	case bytesize.Size, *bytesize.Size:
		f.Type, f.Pattern = batch.IntOrText, batch.SizePattern
	case rate:
		f.Type, f.Pattern, f.Least = batch.IntOrText, batch.SizePattern, 1
	case connections:
		f.Type, f.Pattern, f.Least = batch.IntOrText, "^(auto|[0-9]+)$", 1
	case retries:
		f.Type, f.Pattern = batch.IntOrText, "^(unlimited|[0-9]+)$"
	case digestFlag:
		f.Type, f.Enum = batch.BoolOrText, []string{string(digest.Blksum), string(digest.SHA256)}
	case quiesceFlag:
		f.Type, f.Enum = batch.BoolOrText, []string{"try"}
	case []string, vddkDebug:
		f.Type = batch.Array
	default:
		return batch.Field{}, fmt.Errorf("--%s: no JSON type is known for the Go type %T", flag.Name, value)
	}
	if flag.Enum != "" {
		f.Enum = slices.DeleteFunc(flag.EnumSlice(), func(s string) bool { return s == "" })
	}
	f.Path = flag.Tag.Type == "path" || flag.Name == "allow-path"
	group := ""
	if flag.Group != nil {
		group = flag.Group.Key
	}
	f.Tuning = group == "Speed:" || group == "VDDK:" && !slices.Contains(decidingVDDK, flag.Name) ||
		slices.Contains([]string{"retries", "retry-timeout", "timeout", "force", "journal"}, flag.Name)
	f.Check = func(text string) error {
		target := reflect.New(flag.Target.Type()).Elem()
		if target.Kind() == reflect.Pointer {
			target.Set(reflect.New(target.Type().Elem()))
		}
		scan := kong.ScanAsType(kong.FlagValueToken, text)
		return flag.Mapper.Decode(&kong.DecodeContext{Value: flag.Value, Scan: scan}, target)
	}
	return f, nil
}

// The method command parses the fields of a job as flags of vddkcp copy. It returns a new
// copyCommand, which the caller may change.
func (p *jobParser) command(j *batch.Job) (*copyCommand, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.set(j); err != nil {
		return nil, err
	}
	c := p.line.copyCommand
	return &c, nil
}

// The method set parses the fields of a job into p.line, where kong would store the flags
// of a command line. It returns an error if a flag or an address of the job is invalid. The
// caller holds the lock p.mu.
func (p *jobParser) set(j *batch.Job) error {
	switch {
	case j.Source == "-":
		return errors.New("source: a batch cannot read standard input")
	case j.Target == "-":
		return errors.New("target: a batch cannot write to standard output")
	}
	p.line.copyCommand = p.defaults
	c := &p.line.copyCommand
	c.Src, c.Dst = j.Source, j.Target
	given := map[string]bool{}
	for _, v := range j.Values {
		if v.Field == &p.implied {
			continue
		}
		given[p.flags[v.Field.Name].Name] = true
		if err := p.setFlag(v); err != nil {
			return err
		}
	}
	c.login = newLogin(&p.environment, p.config, given)
	c.login.ofJob = true
	if err := c.Validate(); err != nil {
		return err
	}
	addresses := c.addresses()
	if err := addresses.Parse(); err != nil {
		return hintInText(err)
	}
	for _, s := range []*secretFlag{&c.Password, &c.Cookie} {
		if s.form == inPlain {
			s.form = inJobFile
		}
	}
	if err := c.chooseWay(); err != nil {
		return hintInText(err)
	}
	return nil
}

// hintInText returns err with its hint in its text, because a job file may have many mistakes, and
// each of them needs its own hint.
func hintInText(err error) error {
	if hint := hinted.Of(err); hint != "" {
		return fmt.Errorf("%w (%s)", err, hint)
	}
	return err
}

// implyServer finds out the server of a job that is in p.line. If only the environment or a
// profile names it, implyServer adds the field server to the job, because package batch needs
// the server for the limits of the batch and to recognize a job whose source has changed. The
// caller holds the lock p.mu.
func (p *jobParser) implyServer(j *batch.Job) error {
	c := &p.line.copyCommand
	source, err := address.Parse(j.Source, address.Source)
	if err != nil || !c.remoteAddress(source) {
		return nil // set has reported an invalid address
	}
	r, err := c.resolve()
	if err != nil {
		return hintInText(err)
	}
	if r.server == "" || c.login.given["server"] {
		return nil
	}
	i := 0
	for i < len(j.Values) && p.order(j.Values[i].Field.Name) < p.order("server") {
		i++
	}
	j.Values = slices.Insert(j.Values, i, batch.Value{Field: &p.implied, Texts: []string{r.server}})
	return nil
}

// The method profiles returns the profiles that the given jobs name.
func (p *jobParser) profiles(jobs []*batch.Job) (all []*profile.Profile) {
	seen := map[string]bool{"": true}
	for _, j := range jobs {
		name := cmp.Or(j.Text("profile"), p.defaults.Profile)
		if seen[name] {
			continue
		}
		seen[name] = true
		if found, err := p.config.Find(name); err == nil {
			all = append(all, found)
		}
	}
	return all
}

// The method order returns the place of a field among all fields.
func (p *jobParser) order(name string) int { return slices.Index(p.parser.Model.Flags, p.flags[name]) }

// setFlag sets a flag in p.line to the value of a field, in the same way as kong does for
// --FLAG=TEXT. Parsing a command line with kong would take a hundred times as long, because
// kong visits all flags several times.
func (p *jobParser) setFlag(v batch.Value) error {
	flag := p.flags[v.Field.Name]
	bare := v.Field.Type == batch.Boolean || v.Field.Type == batch.BoolOrText
	for _, text := range v.Texts {
		scan := kong.Scan()
		switch {
		case bare && text == "true":
		case bare && text == "false":
			continue
		default:
			scan.PushTyped(text, kong.FlagValueToken)
		}
		if flag.Target.Kind() == reflect.Pointer {
			flag.Target.Set(reflect.New(flag.Target.Type().Elem()))
		}
		if err := flag.Mapper.Decode(&kong.DecodeContext{Value: flag.Value, Scan: scan}, flag.Target); err != nil {
			return fmt.Errorf("--%s: %w", flag.Name, err)
		}
	}
	return nil
}

// The methods of fileNames compute keys that identify the file, device or export at an
// address. An example of a key is "path /a/b", for a path without symbolic links. Two paths
// that lead to the same file, for example through a symbolic link, have at least one key in
// common. The map is a cache: it maps the path of a folder to the path of the same folder
// without symbolic links.
type fileNames map[string]string

func (n fileNames) of(text string) []string {
	a, err := address.Parse(text, address.Target) // a source is parsed like a target, because only paths matter here
	switch {
	case err != nil:
		return nil
	case address.IsRemote(a):
		return []string{"nbd " + text}
	}
	path, ok := a.(address.Path)
	if !ok {
		return nil
	}
	return n.ofPath(string(path))
}

func (n fileNames) ofPath(address string) []string {
	var st unix.Stat_t
	err := unix.Lstat(address, &st)
	slash := strings.LastIndexByte(address, '/')
	base := address[slash+1:]
	known := err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG || errors.Is(err, unix.ENOENT)
	if !known || base == "" || base == "." || base == ".." {
		return filesOf(address)
	}
	folder := n.folder(address[:slash+1])
	if folder == "" {
		return []string{"path " + filepath.Clean(address)}
	}
	path := "path " + strings.TrimSuffix(folder, "/") + "/" + base
	names := []string{path, path + ".partial"} // a copy to a file also writes the .partial file
	if err == nil {
		names = append(names, inode(&st))
	}
	return names
}

// The method folder returns the path of the given folder without symbolic links. It returns
// "" if the folder does not exist.
func (n fileNames) folder(path string) string {
	real, ok := n[path]
	if !ok {
		real, _ = filepath.EvalSymlinks(cmp.Or(path, "."))
		n[path] = real
	}
	return real
}

func inode(st *unix.Stat_t) string { return fmt.Sprintf("inode %d %d", st.Dev, st.Ino) }

// filesOf returns the keys by which package batch compares files. Two paths lead to the
// same file or device if they have a key in common. filesOf returns nil if the given path
// leads to neither a file nor a block device.
func filesOf(path string) []string {
	var names []string
	switch place := sinkopen.PlaceOf(address.Path(path)); place.Kind {
	case "file":
		names = append(names, "path "+place.Path(), "path "+place.Partial)
	case "block device":
	case "":
		return []string{"path " + filepath.Clean(path)}
	default:
		return nil
	}
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil {
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			return append(names, fmt.Sprintf("device %d", st.Rdev))
		}
		names = append(names, inode(&st))
	}
	return names
}

// jobsFile reads a job file. The path "-" means standard input. jobsFile returns at once
// when ctx ends, even if a read blocks. Every few seconds it calls the function notice with
// a message that shows the progress.
func (p *jobParser) jobsFile(ctx context.Context, path string, notice func(string)) (*batch.File, error) {
	spec, err := p.spec()
	if err != nil {
		return nil, err
	}
	var done, all atomic.Int64
	spec.Progress = func(d, a int) {
		done.Store(int64(d))
		all.Store(int64(a))
	}
	loaded := make(chan struct{})
	var f *batch.File
	var failed error
	go func() { // keeps running after a signal if a read blocks
		defer close(loaded)
		f, failed = readJobs(path, spec)
	}()
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-loaded:
			return f, failed
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-tick.C:
			notice(fmt.Sprintf("reading %s: %d%%", path, done.Load()*100/max(all.Load(), 1)))
		}
	}
}

func readJobs(path string, spec *batch.Spec) (*batch.File, error) {
	if path == "-" {
		dir, err := os.Getwd()
		if err != nil {
			return nil, err
		}
		return batch.Load(os.Stdin, "standard input", dir, spec)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return batch.Load(f, path, dir, spec)
}
