package vddk

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/exit"
)

// ParamsError is parameters that name no disk, whatever the server holds.
type ParamsError struct {
	err  error
	hint string
}

func (e *ParamsError) Error() string { return e.err.Error() }
func (e *ParamsError) Unwrap() error { return e.err }

// Hint says what to do about it; it may be empty.
func (e *ParamsError) Hint() string { return e.hint }

// ExitStatus implements the interface of transfer/report.
func (*ParamsError) ExitStatus() int { return exit.Usage }

func wrongParams(hint, format string, args ...any) error {
	return &ParamsError{fmt.Errorf(format, args...), hint}
}

// Compressions are the values of Params.Compression, beside "".
var Compressions = []string{"none", "zlib", "fastlz", "skipz"}

// DebugKeys are the keys of Options.Debug.
var DebugKeys = []string{"diskinfo", "extents", "datapath", "stats"}

// transportModes are those that VDDK knows.
var transportModes = []string{"file", "san", "hotadd", "nbdssl", "nbd"}

// UnknownTransports returns the names in a list of transport modes, separated
// by colons, that VDDK is not known to have. They are for the library to judge.
func UnknownTransports(list string) (unknown []string) {
	for _, name := range strings.Split(list, ":") {
		if name != "" && !slices.Contains(transportModes, name) {
			unknown = append(unknown, name)
		}
	}
	return unknown
}

// maxNFC bounds NFCBuffers to what a host could have at all, in bytes.
const maxNFC = 96 << 20

// Validate says whether the parameters can name a disk, all that is missing at
// once. No library, file or server is looked at. The error is a *ParamsError,
// and holds no secret.
func (p *Params) Validate() error {
	if p.File == "" && !p.meansServer() {
		return wrongParams("", "no disk is named: want [DATASTORE] DIR/DISK.vmdk, or the absolute path of a local VMDK")
	}
	if i := strings.IndexByte(p.File, 0); i >= 0 {
		return wrongParams("", "the path of the disk has a zero byte, at %d", i)
	}
	if err := p.validateRemote(); err != nil {
		return err
	}
	if !p.Remote() && !filepath.IsAbs(p.File) {
		return wrongParams("", "VDDK opens a local VMDK by its absolute path only")
	}
	if p.Thumbprint != "" {
		if _, err := ParseThumbprint(p.Thumbprint); err != nil {
			return wrongParams("", "--thumbprint: %w", err)
		}
	}
	if p.Port > 65535 {
		return wrongParams("", "--port: %d: want 1 to 65535", p.Port)
	}
	if p.NFCHostPort > 65535 {
		return wrongParams("", "--nfchostport: %d: want 1 to 65535", p.NFCHostPort)
	}
	if p.Compression != "" && !slices.Contains(Compressions, p.Compression) {
		return wrongParams("", "--compression: %q: want one of %s", p.Compression, strings.Join(Compressions, ", "))
	}
	if b := p.NFCBuffers; b != (NFCBuffers{}) {
		if b.Size < 64<<10 || b.Size%(64<<10) != 0 || b.Size > maxNFC || b.Count < 1 || b.Count > 1024 || b.Bytes() > maxNFC {
			return wrongParams("", "--nfc-buffers: %d bytes x %d: want a multiple of 64KiB, at least one, 96MiB in all", b.Size, b.Count)
		}
	}
	return nil
}

// validateRemote checks what says where a disk is, and who asks for it.
func (p *Params) validateRemote() error {
	if !p.meansServer() {
		return nil
	}
	var missing []string
	need := func(given bool, what string) {
		if !given {
			missing = append(missing, what)
		}
	}
	need(p.File != "", "the disk (file=)")
	need(p.Remote(), "--server")
	need(p.User != "", "--user")
	need(p.Password.IsSet() || p.Cookie.IsSet(), "--password or --cookie")
	need(p.VM != "", "--vm")
	if len(missing) > 0 {
		return wrongParams("--vm moref=ID is the VM's managed object; VDDKCP_PASSWORD and VDDKCP_COOKIE serve instead of the flags",
			"missing: %s", strings.Join(missing, ", "))
	}
	if strings.ContainsAny(p.Server, "/ \t\n\x00@[]") || strings.HasPrefix(p.Server, "-") {
		return wrongParams("", "--server: %q: want a host's name or address alone", p.Server)
	}
	if i := strings.LastIndexByte(p.Server, ':'); i >= 0 && strings.IndexByte(p.Server, ':') == i {
		return wrongParams("--port has the port", "--server: %q: want a host's name or address alone", p.Server)
	}
	if id, ok := strings.CutPrefix(p.VM, "moref="); !ok || id == "" {
		return wrongParams("the managed object of a VM looks like vm-16 on vCenter and like 2 on an ESXi host", "--vm: %q: want moref=ID", p.VM)
	}
	// They go to a C library: what follows a zero byte would be lost.
	for _, f := range []struct{ name, value string }{
		{"--user", p.User}, {"--password", p.Password.Reveal()}, {"--cookie", p.Cookie.Reveal()},
		{"--vm", p.VM}, {"--snapshot", p.Snapshot},
	} {
		if strings.IndexByte(f.value, 0) >= 0 {
			return wrongParams("", "%s: it has a zero byte", f.name)
		}
	}
	return nil
}

// meansServer says whether the disk is meant to lie on a server, also where
// that is not named: a line that lost its --server must not open a local disk.
func (p *Params) meansServer() bool {
	return p.Remote() || strings.HasPrefix(p.File, "[") ||
		p.User != "" || p.VM != "" || p.Snapshot != "" || p.Thumbprint != "" || p.Port != 0 || p.NFCHostPort != 0
}
