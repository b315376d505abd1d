package vsphere

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Ticket asks the server for a ticket for reading files of the VM, also those that its snapshots
// keep. The ticket is valid for one connection. Its field File is empty: the caller sets it to the
// name of the file to open.
//
// If the VM is not there any more, the error wraps inventory.ErrVMGone. It is permanent if the user
// lacks a privilege, or if the server has no NFC service.
func (v *VM) Ticket(ctx context.Context) (nfc.Ticket, error) {
	s := v.session
	answer, err := s.ticketFor(ctx, v.reference())
	if err != nil {
		if f, ok := faultOf(err).(*types.ManagedObjectNotFound); ok && f.Obj == v.reference() {
			err = inventory.ErrVMGone
		}
		return nfc.Ticket{}, v.explain("get a ticket for reading the disks of", err)
	}
	t := nfc.Ticket{
		Host:    cmp.Or(answer.Host, s.Server),
		Port:    cmp.Or(int(answer.Port), nfc.DefaultPort),
		Service: answer.Service,
		Session: secret.New(answer.SessionId),
		SHA1:    answer.SslThumbprint,
		Giver:   s.address(),
	}
	if answer.SslCertificate != "" {
		t.Certificate = []byte(answer.SslCertificate)
	}
	s.Log.Debug("vsphere: ticket", "vm", v.name, "host", t.Host, "port", t.Port, "service", t.Service)
	return t, nil
}

// ticketFor asks the server for a ticket for the files of a VM.
func (s *Session) ticketFor(ctx context.Context, vm types.ManagedObjectReference) (*types.HostServiceTicket, error) {
	for first := true; ; first = false {
		service, err := s.nfcService(ctx)
		if err != nil {
			return nil, err
		}
		req := nfcGetVmFilesBody{Req: &nfcGetVmFiles{This: service, Vm: vm}}
		res := new(nfcGetVmFilesBody)
		if err = s.client.RoundTrip(ctx, &req, res); err == nil {
			return res.ticket(s.address())
		}
		if f, ok := faultOf(err).(*types.ManagedObjectNotFound); !ok || f.Obj == vm || !first {
			return nil, err
		}
		s.nfc.forget(service) // the server has another one since it was updated
	}
}

// ticket returns the ticket in an answer. It returns an error if the ticket cannot be used.
func (b *nfcGetVmFilesBody) ticket(server string) (*types.HostServiceTicket, error) {
	var t types.HostServiceTicket
	if b.Res != nil {
		t = b.Res.Returnval
	}
	switch {
	case t.SessionId == "" || t.Service == "":
		return nil, fmt.Errorf("%s has answered without a ticket", server)
	case t.Port < 0 || t.Port > 65535:
		return nil, fmt.Errorf("%s has given a ticket for the host %s and the port %d, which is not a port", server, printable.Name(shortened(t.Host)), t.Port)
	}
	return &t, nil
}

// nfcService keeps the reference of the server's NFC service.
type nfcService struct {
	mu  sync.Mutex
	ref types.ManagedObjectReference // the zero value means that it is not known
}

func (n *nfcService) get() types.ManagedObjectReference {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ref
}

func (n *nfcService) set(ref types.ManagedObjectReference) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ref = ref
}

// forget forgets the reference, unless it was replaced already.
func (n *nfcService) forget(ref types.ManagedObjectReference) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ref == ref {
		n.ref = types.ManagedObjectReference{}
	}
}

// nfcService returns the reference of the server's NFC service. It asks the server if the reference
// is not known yet.
func (s *Session) nfcService(ctx context.Context) (types.ManagedObjectReference, error) {
	if ref := s.nfc.get(); ref.Value != "" {
		return ref, nil
	}
	req := retrieveInternalContentBody{Req: &retrieveInternalContent{This: vim25.ServiceInstance}}
	res := new(retrieveInternalContentBody)
	if err := s.client.RoundTrip(ctx, &req, res); err != nil {
		return types.ManagedObjectReference{}, err
	}
	var ref types.ManagedObjectReference
	if res.Res != nil {
		ref = res.Res.Returnval.NfcService
	}
	if ref.Value == "" {
		err := errors.New(s.address() + " has no NFC service")
		return ref, retry.Permanent(hinted.Error(err, "read the disks through VDDK, or connect to another server"))
	}
	ref.Type = cmp.Or(ref.Type, "NfcService")
	s.nfc.set(ref)
	return ref, nil
}

// The following types are the requests and answers of two methods that VMware has not published.
// The library govmomi does not have them. The function methodOf takes the name of a method from the
// name of its body.

type retrieveInternalContent struct {
	This types.ManagedObjectReference `xml:"_this"`
}

type retrieveInternalContentBody struct {
	Req *retrieveInternalContent `xml:"urn:vim25 RetrieveInternalContent,omitempty"`
	Res *struct {
		Returnval struct {
			NfcService types.ManagedObjectReference `xml:"nfcService"`
		} `xml:"returnval"`
	} `xml:"RetrieveInternalContentResponse,omitempty"`
	Fault_ *soap.Fault `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
}

func (b *retrieveInternalContentBody) Fault() *soap.Fault { return b.Fault_ }

type nfcGetVmFiles struct {
	This types.ManagedObjectReference `xml:"_this"`
	Vm   types.ManagedObjectReference `xml:"vm"`
}

type nfcGetVmFilesBody struct {
	Req *nfcGetVmFiles `xml:"urn:vim25 NfcGetVmFiles,omitempty"`
	Res *struct {
		Returnval types.HostServiceTicket `xml:"returnval"`
	} `xml:"NfcGetVmFilesResponse,omitempty"`
	Fault_ *soap.Fault `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
}

func (b *nfcGetVmFilesBody) Fault() *soap.Fault { return b.Fault_ }
