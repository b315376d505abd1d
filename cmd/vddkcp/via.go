package main

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// viaFlag is the value of --via. It is "" if the flag is not given.
type viaFlag string

// These are the values of --via.
const (
	viaAuto viaFlag = "auto"
	viaVDDK viaFlag = "vddk"
	viaNFC  viaFlag = "nfc"
)

func (v *viaFlag) UnmarshalText(text []byte) error {
	if len(text) > 0 && !slices.Contains(profile.Vias, string(text)) {
		return fmt.Errorf("%q: want %s", text, strings.Join(profile.Vias, ", "))
	}
	*v = viaFlag(text)
	return nil
}

// viaFlags say how disks on a server are read.
type viaFlags struct {
	Via      viaFlag `help:"How to read disks on a server: vddk (with VMware's VDDK library), nfc (from the ESXi host, without the library; experimental) or auto (vddk, the default)." enum:",auto,vddk,nfc" default:"" env:"VDDKCP_VIA" placeholder:"auto|vddk|nfc" group:"VDDK:"`
	NFCTrace string  `name:"nfc-trace" help:"With --via nfc: record the messages between vddkcp and the ESXi host in FILE. The file has neither data of disks nor secrets." placeholder:"FILE" type:"path" group:"VDDK:"`
	chosen   way     `kong:"-"`
}

// way says how disks on a server are read. The zero value means through VDDK.
type way struct {
	nfc    bool   // over NFC, not through VDDK
	reason string // such as "asked for (--via)"; "" if nothing was chosen
	quirks nfc.Quirks
}

// The method report returns what the report of a copy says about w. It is the zero value if nothing
// was chosen, because the disk is not on a server.
func (w way) report() report.Way {
	if w.reason == "" {
		return report.Way{}
	}
	return report.Way{Via: w.name(), Reason: w.reason, NFCQuirks: w.quirks.String()}
}

func (w way) name() string {
	if w.nfc {
		return string(viaNFC)
	}
	return string(viaVDDK)
}

// String returns a text for the log, such as "via nfc: asked for (--via)".
func (w way) String() string { return "via " + w.name() + ": " + w.reason }

// The method log logs w. Only NFC is worth a line that the user sees by default.
func (w way) log(s *servers, log *slog.Logger) {
	if log == nil || w.reason == "" {
		return
	}
	level := slog.LevelDebug
	if w.nfc {
		level = slog.LevelInfo
	}
	s.logOnce(log, level, w.String())
}

// reads are flags for reading that only some commands have.
type reads struct {
	requestSize bytesize.Size
	depth       int
	connections connections
	writable    bool
}

// The method choose decides how disks on a server are read: it looks at the given sources, and ignores
// those that are not on a server. A command calls it before it calls the method opener and before it
// opens an output. The error is a usage error if other flags contradict --via or --nfc-trace.
//
// If the profile cannot be used, choose returns nil. The error is then returned when a disk is opened.
func (f *sourceFlags) choose(r reads, sources ...address.Address) error {
	f.chosen = way{}
	if !slices.ContainsFunc(sources, f.remoteAddress) {
		return f.refuseLocal(sources)
	}
	settled, err := f.resolve()
	if err != nil {
		return nil
	}
	w := f.way(settled, f.Via)
	if i := slices.IndexFunc(sources, isForVDDK); i >= 0 && w.nfc {
		others := slices.ContainsFunc(sources, func(a address.Address) bool { return f.remoteAddress(a) && !isForVDDK(a) })
		if others || f.login.given["via"] {
			return usage.New(fmt.Sprintf("--via: nfc cannot read %s, which names a disk that VDDK opens", sources[i]), "name the disk as vm:NAME#N or [DATASTORE] DIR/DISK.vmdk, or leave out --via nfc")
		}
		w = way{reason: "the address begins with vddk:"}
	}
	if !w.nfc && f.NFCTrace != "" {
		return needsNFC()
	}
	if w.nfc {
		if err := f.checkNFC(r, w); err != nil {
			return err
		}
		if err := checkFolder("--nfc-trace", f.NFCTrace); err != nil {
			return err
		}
		if w.quirks, err = nfc.ParseQuirks(os.Getenv("VDDKCP_NFC")); err != nil {
			return usage.WithHint(fmt.Errorf("the environment variable VDDKCP_NFC: %w", err), "unset the variable: it is only for finding out why a host refuses a connection")
		}
	}
	f.chosen = w
	return nil
}

// isForVDDK reports whether an address asks for VDDK.
func isForVDDK(a address.Address) bool {
	_, ok := a.(address.VDDK)
	return ok
}

func needsNFC() error {
	return usage.New("--nfc-trace needs --via nfc", "leave out --nfc-trace, or add --via nfc")
}

// The method refuseLocal returns an error if flags on the command line are only for disks on a
// server. A job file may have them, because its defaults are for all jobs.
func (f *sourceFlags) refuseLocal(sources []address.Address) error {
	switch {
	case f.NFCTrace != "":
		return needsNFC()
	case f.Via != viaNFC || !f.login.given["via"] || f.login.ofJob:
		return nil
	}
	what := "no disk that is read is on a server"
	if len(sources) == 1 && sources[0] != nil {
		what = sources[0].String() + " is not on a server"
	}
	return usage.New("--via: nfc is for disks on a server, and "+what, "leave out --via; disks on a server are named as vm:NAME#N or [DATASTORE] DIR/DISK.vmdk")
}

// The method way returns how disks on a server are read. The parameter flag is the field of the flag
// --via.
func (f *serverFlags) way(r *settled, flag viaFlag) way {
	asked, from := f.via(r, flag)
	switch asked {
	case viaNFC, viaVDDK:
		return way{nfc: asked == viaNFC, reason: "asked for (" + from + ")"}
	case viaAuto:
		return way{reason: "chosen by auto (" + from + ")"}
	}
	return way{reason: "the default"}
}

// The method nfcDepth returns the number of concurrent reads of a disk. The parameter flag is the
// value of --depth, whose default is for VDDK and NBD.
func (f *sourceFlags) nfcDepth(flag int) int {
	if f.chosen.nfc && !f.login.given["depth"] {
		return nfc.DefaultDepth
	}
	return flag
}

// The method checkNFC returns an error if a flag is not for disks that are read over NFC.
func (f *sourceFlags) checkNFC(r reads, w way) error {
	const forVDDK = "flags for VDDK cannot be used"
	given := f.login.given
	for _, flag := range []struct {
		wrong     bool
		name, why string
	}{
		{f.Config != "", "--config", forVDDK},
		{f.LibDir != "" && given["libdir"], "--libdir", forVDDK},
		{f.PrepareAccess, "--prepare-access", forVDDK},
		{f.Unbuffered, "--unbuffered", forVDDK},
		{f.SingleLink, "--single-link", "a disk cannot be read without its parents"},
		{r.writable, "--rw", "disks cannot be written"},
		{f.Compression != "" && !slices.Contains(nfc.Compressions, f.Compression), "--compression", fmt.Sprintf("want %s, found %s", strings.Join(nfc.Compressions, ", "), f.Compression)},
		{r.connections > 1, "--connections", fmt.Sprintf("want 1 connection, found %d", r.connections)},
		{given["depth"] && r.depth > nfc.MaxDepth, "--depth", fmt.Sprintf("want 1 to %d concurrent reads, found %d", nfc.MaxDepth, r.depth)},
		{r.requestSize > maxNFCRequest, "--request-size", fmt.Sprintf("want at most %s, found %s", bytesize.Exact(maxNFCRequest), bytesize.Exact(int64(r.requestSize)))},
	} {
		if flag.wrong {
			return f.contradicts(w, flag.name, flag.why)
		}
	}
	for _, name := range strings.Split(f.Transports, ":") {
		if name != "" && name != "nbd" && name != "nbdssl" {
			return f.contradicts(w, "--transports", "want nbdssl or nbd, found "+printable.Name(name))
		}
	}
	if b := f.NFCBuffers; b != (nfcBuffers{}) &&
		(b.Size < nfcbudget.Unit || b.Size%nfcbudget.Unit != 0 || b.Size > maxNFCBuffer || b.Count < 1 || b.Count > 1024 || nfcbudget.Buffers(b).Bytes() > maxNFCBuffers) {
		return f.contradicts(w, "--nfc-buffers", fmt.Sprintf("want one or more buffers whose size is a multiple of 64KiB, of at most %s each and %s together, found %sx%d",
			bytesize.Exact(maxNFCBuffer), bytesize.Exact(maxNFCBuffers), bytesize.Exact(b.Size), b.Count))
	}
	return nil
}

// These are the limits of a request and of the buffers of a connection over NFC, in bytes. Hosts
// refuse more.
const (
	maxNFCRequest = 1 << 20
	maxNFCBuffer  = 2 << 20
	maxNFCBuffers = 16 << 20
)

// The method contradicts returns the error for a flag that contradicts NFC.
func (f *sourceFlags) contradicts(w way, flag, why string) error {
	asked := "--via nfc"
	if !f.login.given["via"] {
		asked = "nfc, which is " + w.reason
	}
	return usage.New(fmt.Sprintf("%s: with %s, %s", flag, asked, why), "change or leave out this flag, or read the disk through VDDK with --via vddk")
}

// The method clear reports whether data is sent without encryption: if --transports asks for nbd
// rather than nbdssl.
func (f *vddkFlags) clear() bool {
	for _, name := range strings.Split(f.Transports, ":") {
		if name != "" {
			return name == "nbd"
		}
	}
	return false
}
