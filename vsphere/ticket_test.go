package vsphere

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// giver is a server in front of a simulated one. It answers some methods with texts of its own.
type giver struct {
	*Session
	mu       sync.Mutex
	answers  map[string][]string // by method: the answers to its calls; the last one is repeated
	requests map[string][]string
}

// newGiver returns a giver with a new session.
func newGiver(t *testing.T, server *vspheretest.Server, answers map[string][]string, change ...func(*Options)) *giver {
	t.Helper()
	g := &giver{answers: answers, requests: make(map[string][]string)}
	behind := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: server.URL.Host})
	behind.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	front := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		if !g.answer(w, string(body)) {
			behind.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(front.Close)
	o := optionsOf(t, front.Listener.Addr(), front.Certificate().Raw)
	o.User, o.Password = server.User, secret.New(server.Password)
	for _, f := range change {
		f(&o)
	}
	var err error
	if g.Session, err = Connect(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Session.Close() })
	return g
}

// answer answers a request if the giver has an answer for its method.
func (g *giver) answer(w http.ResponseWriter, request string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for method, list := range g.answers {
		if !strings.Contains(request, "<"+method+" xmlns=\"urn:vim25\">") {
			continue
		}
		n := len(g.requests[method])
		g.requests[method] = append(g.requests[method], request)
		text := list[min(n, len(list)-1)]
		w.Header().Set("Content-Type", "text/xml; charset=utf-8")
		if strings.HasPrefix(text, "<soapenv:Fault>") {
			w.WriteHeader(http.StatusInternalServerError)
		} else {
			text = fmt.Sprintf(`<%sResponse xmlns="urn:vim25"><returnval>%s</returnval></%sResponse>`, method, text, method)
		}
		fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" `+
			`xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>%s</soapenv:Body></soapenv:Envelope>`, text)
		return true
	}
	return false
}

// faultText returns an answer that is a fault. The parameter fields is the content of the fault.
func faultText(kind, fields string) string {
	return `<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>no</faultstring><detail><` + kind + `Fault xmlns="urn:vim25" xsi:type="` +
		kind + `">` + fields + `</` + kind + `Fault></detail></soapenv:Fault>`
}

const (
	content    = `<pad>1</pad><nfcService type="NfcService">nfcService</nfcService>`
	fromCenter = `<host>esx1.test</host><port>903</port><sslThumbprint>AA:BB</sslThumbprint><service>vpxa-nfc</service>` +
		`<serviceVersion>1.1</serviceVersion><sessionId>52c0ffee</sessionId>`
	fromHost = `<sslCertificate>PEM</sslCertificate><service>nfc</service><serviceVersion>1.1</serviceVersion><sessionId>52c0ffee</sessionId>`
)

func TestTicket(t *testing.T) {
	t.Parallel()
	server := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	var log bytes.Buffer
	g := newGiver(t, server, map[string][]string{"RetrieveInternalContent": {content}, "NfcGetVmFiles": {fromCenter, fromHost}},
		func(o *Options) {
			o.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
	vm, err := g.Find(t.Context(), "web01")
	if err != nil {
		t.Fatal(err)
	}
	ticket, err := vm.Ticket(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	address := g.Session.address()
	if ticket.File != "" || ticket.Host != "esx1.test" || ticket.Port != 903 || ticket.Service != "vpxa-nfc" ||
		ticket.Session.Reveal() != "52c0ffee" || ticket.SHA1 != "AA:BB" || ticket.Certificate != nil || ticket.Giver != address {
		t.Errorf("ticket of a vCenter server: %+v", ticket)
	}
	ticket, err = vm.Ticket(t.Context())
	if err != nil || ticket.Host != "127.0.0.1" || ticket.Port != 902 || ticket.Service != "nfc" || ticket.SHA1 != "" || string(ticket.Certificate) != "PEM" {
		t.Errorf("ticket of a host: %+v, %v", ticket, err)
	}
	if n := len(g.requests["RetrieveInternalContent"]); n != 1 {
		t.Errorf("%d calls of RetrieveInternalContent", n)
	}
	want := `<_this type="NfcService">nfcService</_this><vm type="VirtualMachine">` + vm.Moref() + `</vm>`
	if request := g.requests["NfcGetVmFiles"][0]; !strings.Contains(request, want) {
		t.Errorf("request %s, want %s", request, want)
	}
	if !strings.Contains(log.String(), "vpxa-nfc") || strings.Contains(log.String(), "c0ffee") {
		t.Errorf("log:\n%s", log.String())
	}
}

func TestTicketOfSimulator(t *testing.T) {
	t.Parallel()
	for _, host := range []bool{false, true} {
		server := vspheretest.New(t, vspheretest.VM{Name: "web01"}, vspheretest.Configure(func(o *vspheretest.Options) { o.ESXi = host }))
		vm := findVM(t, server, "web01")
		server.EndSessions()
		first, err := vm.Ticket(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		server.On("NfcGetVmFiles", vspheretest.Fault{VM: "web01", Cut: vspheretest.After, Times: 1})
		second, err := vm.Ticket(t.Context())
		if err != nil || first.Session.Reveal() == second.Session.Reveal() || second.Host != "127.0.0.1" || second.Port != server.NFC("").Port() || second.SHA1 == "" {
			t.Errorf("tickets %+v and %+v, error %v", first, second, err)
		}
		server.RevokePrivilege("VirtualMachine.Provisioning.GetVmFiles")
		want := "VirtualMachine.Provisioning.GetVmFiles on VirtualMachine " + vm.Moref()
		if _, err = vm.Ticket(t.Context()); err == nil || !strings.Contains(err.Error(), want) || !retry.IsMarked(err) {
			t.Errorf("error %v, want %s", err, want)
		}
		server.Destroy("web01")
		server.GrantPrivilege("VirtualMachine.Provisioning.GetVmFiles")
		if _, err := vm.Ticket(t.Context()); !errors.Is(err, inventory.ErrVMGone) {
			t.Errorf("error %v", err)
		}
	}
}

func TestTicketRefused(t *testing.T) {
	t.Parallel()
	server := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	moref := server.Find("web01").Value
	gone := func(kind, value string) string {
		return faultText("ManagedObjectNotFound", `<obj type="`+kind+`">`+value+`</obj>`)
	}
	for name, c := range map[string]struct {
		content, ticket []string
		want            string // of the error; "" if there is none
		contents        int    // calls of RetrieveInternalContent
		permanent, gone bool
		hint            string
	}{
		"the VM is gone": {[]string{content}, []string{gone("VirtualMachine", moref)}, "the VM is gone", 1, false, true, ""},
		"another service": {[]string{`<nfcService type="NfcService">old</nfcService>`, content},
			[]string{gone("NfcService", "old"), fromCenter}, "", 2, false, false, ""},
		"no such service":      {[]string{content}, []string{gone("NfcService", "nfcService")}, "NfcService nfcService does not exist any more", 2, false, false, ""},
		"no service":           {[]string{"<pad/>"}, []string{fromCenter}, "has no NFC service", 1, true, false, "VDDK"},
		"no privilege":         {[]string{content}, []string{faultText("NoPermission", "<privilegeId>VirtualMachine.Provisioning.GetVmFiles</privilegeId>")}, "the privilege VirtualMachine.Provisioning.GetVmFiles", 1, true, false, "check --role"},
		"invalid argument":     {[]string{content}, []string{faultText("InvalidArgument", "<invalidProperty>vm</invalidProperty>")}, "InvalidArgument", 1, false, false, ""},
		"an empty ticket":      {[]string{content}, []string{""}, "without a ticket", 1, false, false, ""},
		"a wrong port":         {[]string{content}, []string{strings.Replace(strings.Replace(fromCenter, "903", "70000", 1), "esx1", "\u202eesx1", 1)}, `host "\u202eesx1.test" and the port 70000`, 1, false, false, ""},
		"failed in the server": {[]string{content}, []string{faultText("SystemError", "<reason>busy</reason>"), fromCenter}, "", 1, false, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGiver(t, server, map[string][]string{"RetrieveInternalContent": c.content, "NfcGetVmFiles": c.ticket},
				func(o *Options) { o.Retry = optionsFor(server).Retry })
			vm, err := g.Find(t.Context(), "web01")
			if err != nil {
				t.Fatal(err)
			}
			ticket, err := vm.Ticket(t.Context())
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) || ticket.Session.IsSet() != (err == nil) {
				t.Fatalf("ticket %+v, error %v; want %q", ticket, err, c.want)
			}
			if n := len(g.requests["RetrieveInternalContent"]); n != c.contents {
				t.Errorf("%d calls of RetrieveInternalContent, want %d", n, c.contents)
			}
			if err == nil {
				return
			}
			if retry.IsMarked(err) != c.permanent || errors.Is(err, inventory.ErrVMGone) != c.gone || !strings.Contains(err.Error(), `the VM "web01"`) {
				t.Errorf("error %v", err)
			}
			if strings.Contains(err.Error(), "c0ffee") || !strings.Contains(hint(err), c.hint) {
				t.Errorf("error %v, hint %q", err, hint(err))
			}
		})
	}
}

// If the session has ended, a ticket is asked for in a new one. An answer that cannot be decoded is an
// error without the secret.
func TestTicketIsAskedAgain(t *testing.T) {
	t.Parallel()
	server := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	g := newGiver(t, server, map[string][]string{"RetrieveInternalContent": {content}, "NfcGetVmFiles": {
		faultText("NotAuthenticated", ""), fromCenter, strings.Replace(fromCenter, "</sessionId>", "", 1)}})
	vm, err := g.Find(t.Context(), "web01")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := vm.Ticket(t.Context()); err != nil {
		t.Error(err)
	}
	if n := server.Calls()["Login"]; n != 2 {
		t.Errorf("%d logins", n)
	}
	_, err = vm.Ticket(t.Context())
	if err == nil || !strings.Contains(err.Error(), "not one of the vSphere API") || strings.Contains(err.Error(), "c0ffee") {
		t.Errorf("error %v", err)
	}
}

func TestFindMoref(t *testing.T) {
	t.Parallel()
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01")
	tree := server.Snapshots("web01")
	for _, e := range tree {
		found, err := v.FindMoref(t.Context(), e.Ref.Value)
		if err != nil || found.Name != e.Name || found.Moref != e.Ref.Value || len(found.Disks) != 2 {
			t.Errorf("FindMoref(%q) = %+v, %v", e.Ref.Value, found, err)
		}
	}
	server.RemoveSnapshotBehindBack("web01", "base")
	if _, err := v.FindMoref(t.Context(), tree[0].Ref.Value); !errors.Is(err, inventory.ErrSnapshotGone) {
		t.Errorf("a snapshot that was removed: %v", err)
	}
	if _, err := v.FindMoref(t.Context(), "snapshot-\n1"); !errors.Is(err, inventory.ErrSnapshotGone) || strings.Contains(err.Error(), "\n") {
		t.Errorf("a snapshot that never was there: %v", err)
	}
	server.Destroy("web01")
	if _, err := v.FindMoref(t.Context(), tree[1].Ref.Value); !errors.Is(err, inventory.ErrVMGone) {
		t.Errorf("a VM that was removed: %v", err)
	}
}
