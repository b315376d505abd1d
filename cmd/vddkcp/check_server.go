package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// defaultNFCPort is the TCP port on which an ESXi host sends the data of disks.
const defaultNFCPort = 902

// serverChecks are the checks of a server and of a VM. The steps fill the fields of the second
// group for the steps after them.
type serverChecks struct {
	options        vsphere.Options
	thumbprintFrom string // where the thumbprint in options comes from, such as "--thumbprint"
	vmName         string // "": no VM is checked
	read           bool
	overNFC        bool // disks are read over NFC, so no library is needed
	clear          bool // data is sent without encryption
	libDir         string
	nfcPort        uint32
	log            *slog.Logger

	// open opens a disk, if necessary of a snapshot that is removed when the last disk of the VM is
	// closed. It is called only if read is set.
	open func(ctx context.Context, vm *vsphere.VM, d *inventory.Disk) (source.Disk, error)
	// probe connects to the host of a VM over NFC, and progress has the steps of the last connection
	// over NFC. Both are used only if overNFC is set.
	probe    func(ctx context.Context, vm *vsphere.VM) (*nfc.Probed, error)
	progress *nfcProgress

	session *vsphere.Session
	handle  *vsphere.VM
	vm      *inventory.VM
	library vddk.Library
}

// These are the time limits of the steps. A call to the server may take longer than opening a
// connection, if the inventory is large.
const (
	connectLimit = 30 * time.Second
	callLimit    = 2 * time.Minute
	readLimit    = 10 * time.Minute
)

// The method steps returns the checks in their order.
func (c *serverChecks) steps() []checkStep {
	steps := []checkStep{
		{"server", nil, connectLimit, c.checkServer},
		{"certificate", []string{"server"}, connectLimit, c.checkCertificate},
		{"login", []string{"server", "certificate"}, callLimit, c.checkLogin},
		{"product", []string{"login"}, callLimit, c.checkProduct},
	}
	library := checkStep{"library", nil, loadTimeout, c.checkLibrary}
	if c.vmName == "" && !c.overNFC {
		return append(steps, library)
	}
	if c.vmName == "" {
		return steps
	}
	ofVM := func(check func(*inventory.VM) []checkResult) func(context.Context) []checkResult {
		return func(context.Context) []checkResult { return check(c.vm) }
	}
	vm := []string{"login", "vm"}
	steps = append(steps,
		checkStep{"vm", []string{"login"}, callLimit, c.findVM},
		checkStep{"disks", vm, callLimit, ofVM(checkDisks)},
		checkStep{"tracking", vm, callLimit, ofVM(checkTracking)},
		checkStep{"snapshots", vm, callLimit, ofVM(checkSnapshots)},
		checkStep{"question", vm, callLimit, ofVM(checkQuestion)},
		checkStep{"privileges", vm, callLimit, c.checkPrivileges},
	)
	reading := vm
	if !c.overNFC {
		reading = []string{"login", "vm", "library"}
		steps = append(steps, library, checkStep{"library version", reading, callLimit, func(context.Context) []checkResult {
			return checkVersions(c.library.Version, c.vm.HostVersion)
		}})
	}
	steps = append(steps,
		checkStep{"host", vm, connectLimit, c.checkHost},
	)
	if c.overNFC {
		steps = append(steps, checkStep{"nfc", vm, callLimit, c.checkNFC})
	}
	steps = append(steps,
		checkStep{"space", vm, callLimit, ofVM(checkSpace)},
	)
	if c.read {
		steps = append(steps, checkStep{"read", reading, readLimit, c.readDisks})
	}
	return steps
}

// The method close logs out.
func (c *serverChecks) close() {
	if c.session == nil {
		return
	}
	if err := c.session.Close(); err != nil {
		c.log.Warn(err.Error())
	}
}

func (c *serverChecks) checkServer(ctx context.Context) []checkResult {
	return dial(ctx, c.options.Server, cmp.Or(c.options.Port, certificate.DefaultPort), "check the name of the server, its port (--port), and the firewalls in between")
}

// The function dial checks that the name of a host can be resolved and that a TCP port of the host
// accepts connections.
func dial(ctx context.Context, host string, port uint32, hint string) []checkResult {
	addresses, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		if ctx.Err() != nil {
			return checkError(ctx, err)
		}
		return checkFailed("check the name and the name server of this machine", "cannot resolve the name %s: %v", printable.Name(host), lookupReason(err))
	}
	name := printable.Name(host)
	if list := strings.Join(addresses, ", "); list != host {
		name += " (" + list + ")"
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10)))
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return checkFailed(hint, "%s: cannot connect to the TCP port %d: %v", name, port, err)
	}
	conn.Close()
	return checkOK("%s accepts connections to the TCP port %d", name, port)
}

// lookupReason returns the reason for a failed lookup, without the name of the host.
func lookupReason(err error) string {
	var failed *net.DNSError
	if errors.As(err, &failed) {
		return failed.Err
	}
	return err.Error()
}

func (c *serverChecks) checkCertificate(ctx context.Context) []checkResult {
	_, err := certificate.CheckThumbprint(ctx, c.options.Server, c.options.Port, c.options.Thumbprint)
	if err != nil {
		return checkError(ctx, err)
	}
	if c.options.Thumbprint != "" {
		return checkOK("the certificate has the thumbprint of %s", c.thumbprintFrom)
	}
	return checkOK("the system's certificate authorities verify the certificate")
}

func (c *serverChecks) checkLogin(ctx context.Context) []checkResult {
	s, err := vsphere.Connect(ctx, c.options)
	if err != nil {
		return checkError(ctx, err)
	}
	c.session = s
	if c.options.Cookie.IsSet() {
		return checkOK("the session of the cookie is open")
	}
	return checkOK("logged in as %s", printable.Name(c.options.User))
}

func (c *serverChecks) checkProduct(ctx context.Context) []checkResult {
	about := c.session.About()
	manager, err := c.session.ManagedBy(ctx)
	if err != nil {
		return checkError(ctx, err)
	}
	if manager != "" {
		return checkWarning("use the vCenter server: snapshots and logins of its hosts are better made there",
			"%s, which the vCenter server %s manages", printable.Name(about.Name), printable.Name(manager))
	}
	return checkOK("%s", printable.Name(about.Name))
}

func (c *serverChecks) findVM(ctx context.Context) []checkResult {
	vm, err := c.session.Find(ctx, c.vmName)
	if err != nil {
		return checkError(ctx, err)
	}
	if c.vm, err = vm.Describe(ctx); err != nil {
		return checkError(ctx, err)
	}
	c.handle = vm
	return checkVM(c.vm)
}

func (c *serverChecks) checkPrivileges(ctx context.Context) []checkResult {
	lacking, err := c.session.Missing(ctx, c.vm, usesOf(c.vm)...)
	if err != nil {
		return checkError(ctx, err)
	}
	return checkLacking(lacking)
}

// checkLibrary loads the library, as a copy does.
func (c *serverChecks) checkLibrary(ctx context.Context) []checkResult {
	library, err := vddk.FindLibrary(c.libDir)
	if err != nil {
		return checkError(ctx, orOverNFC(err))
	}
	modes, err := vddk.TransportModes(ctx, library)
	if errors.Is(err, vddk.ErrNoWorker) {
		if missing := vddk.Missing(library); len(missing) > 0 {
			err = &vddk.MissingError{Library: library.Path, Names: missing}
		}
	}
	if err != nil {
		return checkError(ctx, err)
	}
	c.library = library
	return checkOK("VDDK %d, %s, with the transport modes %s", library.Version, printable.Name(library.Path), printable.Name(modes))
}

func (c *serverChecks) checkHost(ctx context.Context) []checkResult {
	host := c.vm.Host
	if !c.session.About().VCenter {
		host = c.options.Server // the server is the host, and its own name for itself may be "localhost"
	}
	if host == "" {
		return checkFailed("", "the server does not show the host of the VM")
	}
	results := dial(ctx, host, c.nfcPort, "disks are read from the host itself: allow connections from this machine to this port of the host")
	if c.overNFC && !results[0].OK {
		// The check nfc connects to the address in the ticket, which may be another one.
		return checkWarning(results[0].Hint, "%s", results[0].Detail)
	}
	return results
}

// The method readDisks reads the first sector of each disk that can be copied now. All disks stay
// open until the end, so that they share one snapshot of a running VM.
func (c *serverChecks) readDisks(ctx context.Context) (results []checkResult) {
	var opened []source.Disk
	for i := range c.vm.Disks {
		d := &c.vm.Disks[i]
		if !d.Verdict.CopyableIn(c.vm.Power) {
			continue
		}
		disk, err := c.open(ctx, c.handle, d)
		if err == nil {
			opened = append(opened, disk)
			_, err = disk.ReadAt(make([]byte, min(sector, disk.Size())), 0)
		}
		if err != nil {
			failed := checkError(ctx, err)[0]
			failed.Detail = d.Title() + ": " + failed.Detail
			if c.overNFC {
				failed.Detail += "; " + c.progress.reached(err)
			}
			results = append(results, failed)
			continue
		}
		detail := d.Title() + " can be read"
		if c.overNFC {
			detail += "; " + c.progress.reached(nil)
		}
		results = append(results, checkResult{OK: true, Detail: detail})
	}
	for _, disk := range opened {
		if err := disk.Close(); err != nil {
			results = append(results, checkFailed(hinted.Of(err), "%v", err)...)
		}
	}
	if len(results) == 0 {
		return checkFailed("", "the VM has no disk that can be copied now")
	}
	return results
}

// sector is the number of bytes that --read reads of each disk.
const sector = 512
