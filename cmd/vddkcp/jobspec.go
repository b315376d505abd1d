package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"vddkcp/internal/bytesize"
	"vddkcp/nbd"
	sinkopen "vddkcp/sink/open"
	sourceopen "vddkcp/source/open"
	"vddkcp/transfer/batch"
	"vddkcp/transfer/digest"
)

// notJobFields are the flags of copy that are none of a job's, by docs/cli.md.
var notJobFields = []string{"progress", "report", "resume", "dry-run"}

// decidingVDDK are the flags of VDDK that say which disk is read. With the
// others it is the same disk, on another way.
var decidingVDDK = []string{"server", "vm", "snapshot"}

// jobParser makes copies of the jobs of a batch, with the parser of the command
// line: what a flag takes, a field takes.
type jobParser struct {
	line   struct{ copyCommand }
	parser *kong.Kong
}

func newJobParser() (*jobParser, error) {
	p := new(jobParser)
	var err error
	p.parser, err = kong.New(&p.line, append(slices.Clone(textMappers), kong.NoDefaultHelp(), kong.Bind(new(secretEnvironment)))...)
	return p, err
}

// spec tells package batch of the flags of copy.
func (p *jobParser) spec() (*batch.Spec, error) {
	s := &batch.Spec{
		// An address that is refused stays as it is, so that the error names it.
		SourcePath: func(a string) bool {
			return a != "-" && !nbd.IsURI(a) && !sourceopen.IsVDDK(a) && sourceopen.CheckAddress(a) == nil
		},
		TargetPath: func(a string) bool {
			return a != "-" && a != "null:" && !nbd.IsURI(a) && sinkopen.CheckAddress(a) == nil
		},
		Files: filesOf,
		Job:   func(j *batch.Job) (any, error) { return p.command(j) },
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
	}
	return s, nil
}

// jobField makes a field of a flag.
func jobField(flag *kong.Flag) (batch.Field, error) {
	f := batch.Field{Name: strings.ReplaceAll(flag.Name, "-", "_"), Help: flag.Help}
	switch value := flag.Target.Interface().(type) {
	case bool:
		f.Type = batch.Boolean
	case int, portFlag:
		f.Type, f.Least = batch.Integer, 1
	case string:
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
	case []string, vddkDebug:
		f.Type = batch.Array
	default:
		return batch.Field{}, fmt.Errorf("--%s: no JSON type is known for a %T", flag.Name, value)
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

// command is the copy of a job.
func (p *jobParser) command(j *batch.Job) (*copyCommand, error) {
	switch {
	case j.Source == "-":
		return nil, errors.New("source: standard input is no source of a batch")
	case j.Target == "-":
		return nil, errors.New("target: standard output is no target of a batch")
	}
	var args []string
	for _, v := range j.Values {
		name := "--" + strings.ReplaceAll(v.Field.Name, "_", "-")
		for _, text := range v.Texts {
			bare := v.Field.Type == batch.Boolean || v.Field.Type == batch.BoolOrText
			switch {
			case bare && text == "true":
				args = append(args, name)
			case bare && text == "false":
			default:
				args = append(args, name+"="+text)
			}
		}
	}
	// In our memory: no process has them as its arguments.
	if _, err := p.parser.Parse(append(args, "--", j.Source, j.Target)); err != nil {
		return nil, err
	}
	c := p.line.copyCommand
	if err := c.checkAddresses(); err != nil {
		if h := hint(err); h != "" {
			err = fmt.Errorf("%w (%s)", err, h)
		}
		return nil, err
	}
	for _, s := range []*secretFlag{&c.Password, &c.Cookie} {
		if s.form == inPlain {
			s.form = inJobFile
		}
	}
	return &c, nil
}

// filesOf are names under which a local file or device is known whatever links
// lead to it, nil for all else.
func filesOf(address string) []string {
	if sourceopen.IsVDDK(address) {
		return nil
	}
	if nbd.IsURI(address) {
		return []string{"nbd " + address}
	}
	var names []string
	switch place := sinkopen.PlaceOf(address); place.Kind {
	case "file":
		// Who writes a file writes its .partial.
		names = append(names, "path "+place.Path(), "path "+place.Partial)
	case "block device":
	case "":
		return []string{"path " + filepath.Clean(address)}
	default:
		return nil
	}
	var st unix.Stat_t
	if unix.Stat(address, &st) == nil {
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			return append(names, fmt.Sprintf("device %d", st.Rdev))
		}
		names = append(names, fmt.Sprintf("inode %d %d", st.Dev, st.Ino))
	}
	return names
}

// jobsFile reads a job file; - is standard input.
func (p *jobParser) jobsFile(path string) (*batch.File, error) {
	spec, err := p.spec()
	if err != nil {
		return nil, err
	}
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
