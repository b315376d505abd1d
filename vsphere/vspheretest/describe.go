package vspheretest

import (
	"crypto/tls"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// Parse returns the Options that a description has. Each line describes one thing:
//
//	server [esxi] [strict] [version=7.0.3] [idle=30m] [managed-by=ADDRESS] [user=NAME]
//	   [password=TEXT]
//	datacenter NAME
//	host NAME [dc=NAME] [disconnected]
//	datastore NAME [dc=NAME] [type=NFS] [free=10GiB]
//	vm NAME [disks=2] [size=8MiB] [dc=NAME] [folder=prod/web] [host=NAME] [datastore=NAME]
//	   [power=on|off|suspended] [template] [noconfig] [ft] [connection=disconnected] [tools=off]
//	   [version=vmx-19] [guest=ID] [tracking] [notracking]
//	disk VM [size=8MiB] [image=FILE] [zero] [datastore=NAME] [file=PATH] [backing=rdm-virtual]
//	   [mode=independent_persistent] [sharing=sharingMultiWriter] [bus=physicalSharing]
//	   [controller=sata] [key=ID] [uuid=UUID|none] [lun=ID] [label=TEXT]
//	snapshot VM NAME
//	nfc [profile=esxi8|esxi703|esxi70|esxi67|esxi60] [latency=20ms] [memory=48MiB] [connections=52]
//	   [fragment=64KiB] [shuffle] [tls12] [pem] [clear]
//
// The line "nfc" changes the NFC services of all hosts. See package nfctest.
// The disks of a line "vm" are made before those of lines "disk", with random data that depends on
// the name of the VM. Words with blanks are put in single quotes, as in 'web 01' or folder='a b'.
// Two single quotes inside stand for one. VM is the name of a VM in a line above; of several VMs
// with that name, it is the last one. Text after "#" is a comment.
//
// The function abs returns the absolute path of an image.
func Parse(text string, abs func(file string) string) (Options, error) {
	p := parser{abs: abs}
	n := 0
	for line := range strings.Lines(text) {
		n++
		words, err := Words(line)
		if err == nil && len(words) > 0 {
			err = p.line(words)
		}
		if err != nil {
			return Options{}, fmt.Errorf("line %d: %w", n, err)
		}
	}
	return p.options, nil
}

// Words divides a line into words. See Parse for quotes and comments.
func Words(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	inWord, quoted := false, false
	runes := []rune(line)
	for i := 0; i < len(runes); i++ {
		switch r := runes[i]; {
		case r == '\'' && quoted && i+1 < len(runes) && runes[i+1] == '\'':
			word.WriteRune(r)
			i++
		case r == '\'':
			quoted, inWord = !quoted, true
		case quoted:
			word.WriteRune(r)
		case strings.ContainsRune(" \t\r\n", r) || r == '#' && !inWord:
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
			if r == '#' {
				return words, nil
			}
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if quoted {
		return nil, fmt.Errorf("the line %q has a quote without an end", strings.TrimSpace(line))
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}

type parser struct {
	options Options
	abs     func(string) string
}

// values are the words KEY=VALUE and KEY of a line. A key that was read is removed.
type values struct {
	m   map[string]string
	err error
}

func newValues(words []string) *values {
	v := &values{m: map[string]string{}}
	for _, w := range words {
		key, value, ok := strings.Cut(w, "=")
		if !ok {
			value = "true"
		}
		v.m[key] = value
	}
	return v
}

func (v *values) text(key string) string {
	s := v.m[key]
	delete(v.m, key)
	return s
}

func (v *values) yes(key string) bool { return v.text(key) == "true" }

func (v *values) fail(key, value string, err error) {
	if err != nil && v.err == nil {
		v.err = fmt.Errorf("%s=%s: %w", key, value, err)
	}
}

func (v *values) size(key string) int64 {
	s := v.text(key)
	if s == "" {
		return 0
	}
	n, err := bytesize.Parse(s)
	v.fail(key, s, err)
	return n
}

func (v *values) number(key string) int {
	s := v.text(key)
	if s == "" {
		return 0
	}
	n, err := strconv.Atoi(s)
	v.fail(key, s, err)
	return n
}

func (v *values) duration(key string) time.Duration {
	s := v.text(key)
	if s == "" {
		return 0
	}
	d, err := time.ParseDuration(s)
	v.fail(key, s, err)
	return d
}

// end returns an error if a value was wrong or a word was not used.
func (v *values) end() error {
	for key := range v.m {
		return fmt.Errorf("the word %q has no meaning here", key)
	}
	return v.err
}

func (p *parser) line(words []string) error {
	kind := words[0]
	if kind == "server" {
		return p.server(newValues(words[1:]))
	}
	if kind == "nfc" {
		return p.nfc(newValues(words[1:]))
	}
	if len(words) < 2 {
		return fmt.Errorf("%q needs a name", kind)
	}
	name, v := words[1], newValues(words[2:])
	switch kind {
	case "datacenter":
		p.options.Datacenters = append(p.options.Datacenters, name)
	case "host":
		p.options.Hosts = append(p.options.Hosts, Host{Name: name, Datacenter: v.text("dc"), Disconnected: v.yes("disconnected")})
	case "datastore":
		p.options.Datastores = append(p.options.Datastores, Datastore{Name: name, Datacenter: v.text("dc"), Type: v.text("type"), Free: v.size("free")})
	case "vm":
		p.options.VMs = append(p.options.VMs, parseVM(name, v))
	case "disk":
		vm := p.vm(name)
		if vm == nil {
			return fmt.Errorf("no VM above is called %q", name)
		}
		vm.Disks = append(vm.Disks, p.disk(v))
	case "snapshot":
		vm := p.vm(name)
		if vm == nil || len(words) != 3 {
			return fmt.Errorf("want: snapshot VM NAME, where VM is the name of a VM above")
		}
		vm.Snapshots = append(vm.Snapshots, words[2])
		return nil
	default:
		return fmt.Errorf("a description has no %q", kind)
	}
	return v.end()
}

func (p *parser) server(v *values) error {
	p.options.ESXi, p.options.StrictLogin = v.yes("esxi"), v.yes("strict")
	p.options.IdleLimit, p.options.ManagedBy = v.duration("idle"), v.text("managed-by")
	p.options.Version = v.text("version")
	p.options.User, p.options.Password = v.text("user"), v.text("password")
	return v.end()
}

// nfcProfiles are the profiles of NFC services by their names in descriptions.
var nfcProfiles = map[string]nfctest.Profile{
	"":        nfctest.ESXi8,
	"esxi8":   nfctest.ESXi8,
	"esxi703": nfctest.ESXi703,
	"esxi70":  nfctest.ESXi70NoSHA256,
	"esxi67":  nfctest.ESXi67,
	"esxi60":  nfctest.ESXi60,
}

func (p *parser) nfc(v *values) error {
	name := v.text("profile")
	profile, ok := nfcProfiles[name]
	if !ok {
		return fmt.Errorf("no profile of an NFC service is called %q", name)
	}
	latency, memory, connections := v.duration("latency"), v.size("memory"), v.number("connections")
	fragment, shuffle, tls12, pem, clear := v.size("fragment"), v.yes("shuffle"), v.yes("tls12"), v.yes("pem"), v.yes("clear")
	p.options.NFC = func(_ string, o *nfctest.Options) {
		o.Profile, o.Latency, o.Memory, o.Connections = profile, latency, memory, connections
		o.Fragment, o.Shuffle, o.PEM, o.NoSSL = int(fragment), shuffle, pem, clear
		if tls12 {
			o.MaxTLS = tls.VersionTLS12
		}
	}
	return v.end()
}

// vm returns the last VM with a name; nil: there is none.
func (p *parser) vm(name string) *VM {
	for i := range slices.Backward(p.options.VMs) {
		if p.options.VMs[i].Name == name {
			return &p.options.VMs[i]
		}
	}
	return nil
}

func parseVM(name string, v *values) VM {
	vm := VM{
		Name: name, Datacenter: v.text("dc"), Folder: v.text("folder"), Host: v.text("host"), Datastore: v.text("datastore"),
		Power: v.text("power"), Template: v.yes("template"), NoConfig: v.yes("noconfig"), FaultTolerant: v.yes("ft"),
		Connection: v.text("connection"), ToolsStopped: v.text("tools") == "off", Version: v.text("version"), Guest: v.text("guest"),
		ChangeTracking: v.yes("tracking"), NoTracking: v.yes("notracking"),
	}
	size := v.size("size")
	for range v.number("disks") {
		vm.Disks = append(vm.Disks, Disk{Size: size})
	}
	return vm
}

func (p *parser) disk(v *values) Disk {
	d := Disk{
		Size: v.size("size"), Image: v.text("image"), Zero: v.yes("zero"), Datastore: v.text("datastore"), File: v.text("file"),
		Backing: v.text("backing"), Mode: v.text("mode"), Sharing: v.text("sharing"), Bus: v.text("bus"), Controller: v.text("controller"),
		KeyID: v.text("key"), UUID: v.text("uuid"), LUN: v.text("lun"), Label: v.text("label"),
	}
	if d.Image != "" {
		d.Image = p.abs(d.Image)
	}
	return d
}
