package vspheretest

import (
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// nfcHosts are the stand-ins for the NFC services of the ESXi hosts.
type nfcHosts struct {
	mu     sync.Mutex
	hosts  map[types.ManagedObjectReference]*nfcHost
	closed bool
}

// nfcHost is the stand-in for the NFC service of a host.
type nfcHost struct {
	*nfctest.Host
	name            string
	allowViolations bool
}

// NFC returns the stand-in for the NFC service of the host with the given name; "": the first host.
// With it, a test makes connections fail, and sees how many there were. The host starts if it has
// not given a ticket yet.
func (s *Server) NFC(host string) *nfctest.Host {
	if host == "" {
		p, err := s.place(VM{})
		s.must(err)
		return s.nfcHost(p.host)
	}
	for _, e := range s.model.Map().All("HostSystem") {
		if h := e.(*simulator.HostSystem); h.Name == host {
			return s.nfcHost(h)
		}
	}
	panic(fmt.Sprintf("vspheretest: there is no host %q", host))
}

// nfcHost returns the stand-in for the NFC service of a host, and starts it if necessary.
func (s *Server) nfcHost(host *simulator.HostSystem) *nfctest.Host {
	s.nfc.mu.Lock()
	defer s.nfc.mu.Unlock()
	if h := s.nfc.hosts[host.Self]; h != nil {
		return h.Host
	}
	if s.nfc.closed {
		panic("vspheretest: the server is closed")
	}
	center := s.datacenterOf(host)
	o := nfctest.Options{
		Service: "vpxa-nfc",
		Open:    func(file string) (*nfctest.Disk, error) { return s.openFile(center, file) },
	}
	if s.options.ESXi {
		o.Service = "nfc"
	}
	if s.options.NFC != nil {
		s.options.NFC(host.Name, &o)
	}
	h, err := nfctest.Start(o)
	s.must(err)
	s.nfc.hosts[host.Self] = &nfcHost{Host: h, name: host.Name, allowViolations: o.AllowViolations}
	return h
}

func (s *Server) datacenterOf(host *simulator.HostSystem) types.ManagedObjectReference {
	for at := host.Parent; at != nil; {
		if at.Type == "Datacenter" {
			return *at
		}
		e, ok := s.model.Map().Get(*at).(mo.Entity)
		if !ok {
			break
		}
		at = e.Entity().Parent
	}
	panic(fmt.Sprintf("vspheretest: the host %q is in no datacenter", host.Name))
}

// list returns the hosts that run, in the order of their names.
func (n *nfcHosts) list() []*nfcHost {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.SortedFunc(maps.Values(n.hosts), func(a, b *nfcHost) int { return strings.Compare(a.name, b.name) })
}

func (n *nfcHosts) close() {
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	for _, h := range n.list() {
		h.Close()
	}
}

// check fails a test because of clients that did something wrong or left connections open.
func (n *nfcHosts) check(t testing.TB) {
	for _, h := range n.list() {
		if h.allowViolations {
			continue
		}
		if !t.Failed() && !h.AwaitClosed(5*time.Second) {
			t.Errorf("NFC service of %s: clients have left %d connections open", h.name, h.Stats().Open)
		}
		for _, v := range h.Violations() {
			t.Errorf("NFC service of %s: %s", h.name, v)
		}
	}
}

var errLocked = errors.New("the file is locked: its VM runs and writes it")

// openFile opens a file such as "[ds1] web01/web01.vmdk" for a client of a host's NFC service. The
// parameter center is the datacenter of the host.
func (s *Server) openFile(center types.ManagedObjectReference, file string) (disk *nfctest.Disk, err error) {
	found := s.eachFile(center, file, func(vm *simulator.VirtualMachine, m *machine, n *node) {
		if vm.Runtime.PowerState == types.VirtualMachinePowerStatePoweredOn && m.writes(n) {
			err = fmt.Errorf("%s: %w", file, errLocked)
			return
		}
		disk, err = n.open()
	})
	if !found {
		return nil, fmt.Errorf("%s: %w", file, fs.ErrNotExist)
	}
	return disk, err
}

// eachFile calls f for the file of a VM in a datacenter, while the VM is locked. It returns false if
// no VM has the file.
func (s *Server) eachFile(center types.ManagedObjectReference, file string, f func(*simulator.VirtualMachine, *machine, *node)) bool {
	s.mu.Lock()
	refs := slices.Collect(maps.Keys(s.machines))
	s.mu.Unlock()
	found := false
	for _, ref := range refs {
		s.locked(ref, func(_ *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
			if m == nil || m.datacenter.Self != center {
				return nil, nil
			}
			for _, n := range m.nodes() {
				if n.name() == file {
					f(vm, m, n)
					found = true
				}
			}
			return nil, nil
		})(s.context())
		if found {
			break
		}
	}
	return found
}

// writes reports whether the VM writes the file n when it runs.
func (m *machine) writes(n *node) bool {
	for _, c := range m.current {
		if c == n {
			return true
		}
	}
	return false
}

// open opens the content of a disk as the file n and its parents hold it.
func (n *node) open() (*nfctest.Disk, error) {
	if n.image == "" {
		return nil, fmt.Errorf("%s has no content: the server was started without WithNFC and WithLibrary", n.name())
	}
	f, err := os.Open(n.image)
	if err != nil {
		return nil, fmt.Errorf("the image of %s: %v", n.name(), err) // not fs.ErrNotExist: the VM has the file
	}
	end, err := f.Seek(0, io.SeekEnd) // the size of a block device too
	if err != nil {
		f.Close()
		return nil, err
	}
	d := &nfctest.Disk{Content: f, Size: n.facts.size, DDB: maps.Clone(n.facts.ddb), Close: f.Close}
	d.DDB["longContentID"] = fmt.Sprintf("%x", sha1.Sum([]byte(n.image)))[:32]
	if end < d.Size {
		d.Content = padded{f}
	}
	return d, nil
}

// padded is an image with zeros after its end.
type padded struct{ io.ReaderAt }

func (p padded) ReadAt(b []byte, off int64) (int, error) {
	n, err := p.ReaderAt.ReadAt(b, off)
	if err == io.EOF {
		clear(b[n:])
		return len(b), nil
	}
	return n, err
}

// facts are what the files of a disk say about it.
type facts struct {
	size int64
	ddb  map[string]string // without the ID of the content
}

func factsOf(d *types.VirtualDisk, controller, version string) *facts {
	f := &facts{size: d.CapacityInBytes, ddb: map[string]string{"adapterType": "lsilogic"}}
	if controller == "ide" {
		f.ddb["adapterType"] = "ide"
	}
	if uuid := spaced(uuidInInventory(d)); uuid != "" {
		f.ddb["uuid"] = uuid
	}
	if hardware, ok := strings.CutPrefix(version, "vmx-"); ok {
		f.ddb["virtualHWVersion"] = hardware
	}
	return f
}

// uuidInInventory returns the UUID that the inventory has for a disk, or "".
func uuidInInventory(d *types.VirtualDisk) string {
	switch b := d.Backing.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		return b.Uuid
	case *types.VirtualDiskSparseVer2BackingInfo:
		return b.Uuid
	case *types.VirtualDiskSeSparseBackingInfo:
		return b.Uuid
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		return b.Uuid
	case *types.VirtualDiskRawDiskVer2BackingInfo:
		return b.Uuid
	case *types.VirtualDiskLocalPMemBackingInfo:
		return b.Uuid
	}
	return ""
}

// spaced returns a UUID of the inventory as files of disks have it: "60 00 C2 ... 7b-9f 22 ... 27". It
// returns "" for a text that is not 16 bytes in hexadecimal, because no file has such an entry.
func spaced(uuid string) string {
	digits := strings.ReplaceAll(uuid, "-", "")
	if b, err := hex.DecodeString(digits); err != nil || len(b) != 16 {
		return ""
	}
	var b strings.Builder
	for i := 0; i < len(digits); i += 2 {
		switch i {
		case 0:
		case 16:
			b.WriteByte('-')
		default:
			b.WriteByte(' ')
		}
		b.WriteString(digits[i : i+2])
	}
	return b.String()
}

// nfcService is the managed object that gives tickets. The simulator does not have it.
type nfcService struct {
	ref types.ManagedObjectReference
	s   *Server
}

func (s *Server) newNFCService() *nfcService {
	n := &nfcService{types.ManagedObjectReference{Type: "NfcService", Value: "nfcService"}, s}
	if s.options.ESXi {
		n.ref.Value = "ha-nfc-service"
	}
	return n
}

// Reference returns the reference of the object.
func (n *nfcService) Reference() types.ManagedObjectReference { return n.ref }

func init() {
	types.Add("NfcGetVmFiles", reflect.TypeFor[nfcGetVmFiles]())
}

type nfcGetVmFiles struct {
	This types.ManagedObjectReference `xml:"_this"`
	Vm   types.ManagedObjectReference `xml:"vm"`
}

type nfcGetVmFilesBody struct {
	Res    *nfcGetVmFilesResponse `xml:"NfcGetVmFilesResponse,omitempty"`
	Fault_ *soap.Fault            `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
}

type nfcGetVmFilesResponse struct {
	Returnval types.HostServiceTicket `xml:"returnval"`
}

func (b *nfcGetVmFilesBody) Fault() *soap.Fault { return b.Fault_ }

// NfcGetVmFiles returns a ticket for one connection, with which the files of a VM can be opened.
func (n *nfcService) NfcGetVmFiles(ctx *simulator.Context, req *nfcGetVmFiles) soap.HasFault {
	s := n.s
	body := new(nfcGetVmFilesBody)
	_, fault := s.locked(req.Vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
		host := ctx.Map.Get(*vm.Runtime.Host).(*simulator.HostSystem)
		if host.Runtime.ConnectionState != types.HostSystemConnectionStateConnected {
			return nil, &types.HostNotConnected{}
		}
		center := m.datacenter.Self
		t := s.nfcHost(host).TicketFor(func(file string) bool { return s.mayOpen(center, req.Vm, file) })
		ticket := types.HostServiceTicket{
			Host: t.Host, Port: int32(t.Port), SslThumbprint: t.SHA1, SslCertificate: string(t.Certificate),
			Service: t.Service, ServiceVersion: "1.1", SessionId: t.Session,
		}
		if s.options.ESXi {
			ticket.Host = ""
		}
		body.Res = &nfcGetVmFilesResponse{ticket}
		return nil, nil
	})(ctx)
	if fault != nil {
		body.Fault_ = simulator.Fault("", fault)
	}
	return body
}

// mayOpen reports whether a ticket for a VM allows to open a file. A ticket does not allow to open
// the files of other VMs.
func (s *Server) mayOpen(center, vm types.ManagedObjectReference, file string) bool {
	owners, others := 0, 0
	s.eachFile(center, file, func(v *simulator.VirtualMachine, _ *machine, _ *node) {
		if v.Self == vm {
			owners++
		} else {
			others++
		}
	})
	return owners > 0 || others == 0
}

// serviceInstance is the ServiceInstance in the registry of a session. The simulator's own one names
// an NFC service that does not exist.
type serviceInstance struct {
	*simulator.ServiceInstance
	s *Server
}

type retrieveInternalContentBody struct {
	Res    *retrieveInternalContentResponse `xml:"RetrieveInternalContentResponse,omitempty"`
	Fault_ *soap.Fault                      `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
}

type retrieveInternalContentResponse struct {
	Returnval internalContent `xml:"returnval"`
}

type internalContent struct {
	NfcService types.ManagedObjectReference `xml:"nfcService"`
}

func (b *retrieveInternalContentBody) Fault() *soap.Fault { return b.Fault_ }

// RetrieveInternalContent returns the reference of the NFC service. The type of the request is
// internal to the simulator.
func (i *serviceInstance) RetrieveInternalContent(any) soap.HasFault {
	return &retrieveInternalContentBody{Res: &retrieveInternalContentResponse{internalContent{i.s.newNFCService().ref}}}
}
