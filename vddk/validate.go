package vddk

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/nfcbudget"
)

// ParamsError says that parameters are wrong or incomplete. They are wrong for every server and
// every disk, so that the same parameters always fail.
type ParamsError struct {
	err  error
	hint string
}

func (e *ParamsError) Error() string { return e.err.Error() }
func (e *ParamsError) Unwrap() error { return e.err }

// Hint tells the user what to do about the error. It is "" if there is no hint.
func (e *ParamsError) Hint() string { return e.hint }

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (*ParamsError) ExitStatus() int { return exit.Usage }

// wrongParams returns a *ParamsError with a formatted message and a hint. The hint may be "".
func wrongParams(hint, format string, args ...any) error {
	return &ParamsError{fmt.Errorf(format, args...), hint}
}

// Compressions are the values that Params.Compression can have, besides "".
var Compressions = []string{"none", "zlib", "fastlz", "skipz"}

// DebugKeys are the possible keys of Options.Debug: the topics of debugging messages.
var DebugKeys = []string{"diskinfo", "extents", "datapath", "stats"}

// transportModes are the names of VDDK's transport modes, the ways in which it reaches a disk.
var transportModes = []string{"file", "san", "hotadd", "nbdssl", "nbd"}

// UnknownTransports returns the names in list that are not transport modes of the known versions
// of VDDK. A newer library may accept them. list has names of transport modes, separated by
// colons.
func UnknownTransports(list string) (unknown []string) {
	for _, name := range strings.Split(list, ":") {
		if name != "" && !slices.Contains(transportModes, name) {
			unknown = append(unknown, name)
		}
	}
	return unknown
}

// maxNFC is the largest amount of NFC memory in bytes that a host can have. The buffers of a
// connection cannot be larger.
const maxNFC = 96 << 20

// Validate returns an error if the parameters cannot name a disk. The error is a *ParamsError
// and contains no secret. If parameters are missing, it names all of them. Validate accesses no
// library, file or server.
func (p *Params) Validate() error {
	if p.File == "" && !p.meansServer() {
		return wrongParams("", "no disk is named: expected [DATASTORE] DIR/DISK.vmdk, or the absolute path of a local VMDK")
	}
	if i := strings.IndexByte(p.File, 0); i >= 0 {
		return wrongParams("", "the path of the disk has a zero byte at offset %d", i)
	}
	if err := p.validateRemote(); err != nil {
		return err
	}
	if !p.Remote() && !filepath.IsAbs(p.File) {
		return wrongParams("", "VDDK opens a local VMDK by its absolute path only")
	}
	if p.Thumbprint != "" {
		if _, err := certificate.ParseThumbprint(p.Thumbprint); err != nil {
			return wrongParams("", "--thumbprint: %w", err)
		}
	}
	if p.Port > 65535 {
		return wrongParams("", "--port: %d is not a port: expected 1 to 65535", p.Port)
	}
	if p.NFCHostPort > 65535 {
		return wrongParams("", "--nfchostport: %d is not a port: expected 1 to 65535", p.NFCHostPort)
	}
	if p.Compression != "" && !slices.Contains(Compressions, p.Compression) {
		return wrongParams("", "--compression: %q: expected one of %s", p.Compression, strings.Join(Compressions, ", "))
	}
	if b := p.NFCBuffers; b != (NFCBuffers{}) {
		if b.Size < nfcbudget.Unit || b.Size%nfcbudget.Unit != 0 || b.Size > maxNFC || b.Count < 1 || b.Count > 1024 || b.Bytes() > maxNFC {
			return wrongParams("", "--nfc-buffers: %d bytes x %d: the size must be a multiple of 64KiB, the count at least 1, and the product at most 96MiB", b.Size, b.Count)
		}
	}
	return nil
}

// validateRemote checks the parameters of a disk on a server, such as those of the login.
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
		return wrongParams("a disk on a server needs a VM and a login; write the managed object reference of the VM as --vm moref=ID; for the login, the password can also be in the environment variable VDDKCP_PASSWORD, or the cookie of an open session in VDDKCP_COOKIE; a profile (--profile NAME) can have the server and the login",
			"missing: %s", strings.Join(missing, ", "))
	}
	if strings.ContainsAny(p.Server, "/ \t\n\x00@[]") || strings.HasPrefix(p.Server, "-") {
		return wrongParams("", "--server: %q: expected only the name or the address of a host", p.Server)
	}
	if i := strings.LastIndexByte(p.Server, ':'); i >= 0 && strings.IndexByte(p.Server, ':') == i {
		return wrongParams("if the server has another port than 443, pass the port with --port and not as a part of --server", "--server: %q: expected only the name or the address of a host", p.Server)
	}
	if id, ok := strings.CutPrefix(p.VM, "moref="); !ok || id == "" {
		return wrongParams("the managed object reference of a VM looks like vm-16 on vCenter, and like 2 on an ESXi host", "--vm: %q: expected moref=ID", p.VM)
	}
	// These strings are passed to a C library, which would ignore everything after a zero byte.
	for _, f := range []struct{ name, value string }{
		{"--user", p.User}, {"--password", p.Password.Reveal()}, {"--cookie", p.Cookie.Reveal()},
		{"--vm", p.VM}, {"--snapshot", p.Snapshot},
	} {
		if strings.IndexByte(f.value, 0) >= 0 {
			return wrongParams("", "%s contains a zero byte", f.name)
		}
	}
	return nil
}

// meansServer reports whether the parameters mean a disk on a server, even if they name no
// server. Without this check, a local disk might be opened if the user forgot --server.
func (p *Params) meansServer() bool {
	return p.Remote() || strings.HasPrefix(p.File, "[") ||
		p.User != "" || p.VM != "" || p.Snapshot != "" || p.Thumbprint != "" || p.Port != 0 || p.NFCHostPort != 0
}
