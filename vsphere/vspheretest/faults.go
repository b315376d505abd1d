package vspheretest

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/types"
	govxml "github.com/vmware/govmomi/vim25/xml"
)

// Fault says what happens to calls instead of what the server would do. Several fields may be set:
// {HangTask: true, Task: f} is a task that hangs until it is released and then fails.
type Fault struct {
	// VM is the name of the VM that the call is about; "": any call. Calls on snapshots of a VM,
	// and those that ask for a ticket for its files, are about this VM.
	VM string
	// Skip is the number of calls that are left alone first, and Times the number of calls that
	// the fault happens to after that; 0: all.
	Skip, Times int
	// Where selects calls; nil: all.
	Where func(c Call) bool

	Soap     types.BaseMethodFault // the call fails with this fault
	Status   int                   // the call is not executed; its answer has this status of HTTP
	Cut      Cut                   // the connection is cut
	Truncate bool                  // the call is executed; its answer ends in the middle
	Hang     bool                  // the call is executed when the rule is released
	Late     bool                  // the call is executed; its answer is sent when the rule is released
	Task     types.BaseMethodFault // the task of the call fails with this fault
	HangTask bool                  // the task of the call begins its work when the rule is released
	Do       func()                // called first
}

// Cut says when a connection is cut.
type Cut int

// The values of Cut.
const (
	NoCut  Cut = iota
	Before     // the call is not executed
	After      // the call is executed, and its answer is lost
)

// Call is a call of a method.
type Call struct {
	Method string // such as "CreateSnapshot_Task"
	This   types.ManagedObjectReference
	Body   string // the whole request

	vm types.ManagedObjectReference // argument of methods of the NFC service
}

// Rule is a fault that a server has been given with On.
type Rule struct {
	Fault
	method string
	s      *Server

	// The following fields are guarded by the mutex of the server.
	seen, hits int
	removed    bool
	arrived    chan struct{}
	released   chan struct{}
	once       struct{ arrive, release sync.Once } // close the channels
}

// On makes a fault happen to calls of a method, such as "CreateSnapshot_Task"; "": of every method.
// If several rules match a call, the newest one counts.
func (s *Server) On(method string, f Fault) *Rule {
	r := &Rule{Fault: f, method: method, s: s, arrived: make(chan struct{}), released: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = append(s.rules, r)
	return r
}

// Arrived returns a channel that is closed when the fault has happened for the first time. If the
// fault lets the call be executed, the call was executed then; its task may still run.
func (r *Rule) Arrived() <-chan struct{} { return r.arrived }

func (r *Rule) happened() { r.once.arrive.Do(func() { close(r.arrived) }) }

// Release lets the calls, answers and tasks go on that the rule makes wait. None waits any more.
func (r *Rule) Release() { r.once.release.Do(func() { close(r.released) }) }

// Hits returns how often the fault has happened.
func (r *Rule) Hits() int {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.hits
}

// Remove ends the rule and releases the calls, answers and tasks that wait.
func (r *Rule) Remove() {
	r.s.mu.Lock()
	r.removed = true
	r.s.rules = slices.DeleteFunc(r.s.rules, func(o *Rule) bool { return o == r })
	r.s.mu.Unlock()
	r.Release()
}

// await waits until the rule is released. It returns false if stop is closed first.
func (r *Rule) await(stop ...<-chan struct{}) bool {
	var a, b <-chan struct{}
	if len(stop) > 0 {
		a = stop[0]
	}
	if len(stop) > 1 {
		b = stop[1]
	}
	select {
	case <-r.released:
		return true
	case <-a:
		return false
	case <-b:
		return false
	}
}

// ClearFaults ends all rules.
func (s *Server) ClearFaults() {
	s.mu.Lock()
	rules := slices.Clone(s.rules)
	s.mu.Unlock()
	for _, r := range rules {
		r.Remove()
	}
}

// Calls returns how often each method was called.
func (s *Server) Calls() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.calls)
}

// pendingKey is a call that is being executed.
type pendingKey struct {
	vm     types.ManagedObjectReference
	method string
}

// takeRule returns the rule for the task of a call that is being executed; nil: none.
func (s *Server) takeRule(vm types.ManagedObjectReference, method string) *Rule {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := pendingKey{vm, method}
	r := s.pendingRules[key]
	delete(s.pendingRules, key)
	return r
}

// vmOf returns the VM that a call is about; zero: none.
func (s *Server) vmOf(c Call) types.ManagedObjectReference {
	switch c.This.Type {
	case "VirtualMachine":
		return c.This
	case "NfcService":
		return c.vm
	case "VirtualMachineSnapshot":
		if o, ok := s.model.Map().Get(c.This).(*simulator.VirtualMachineSnapshot); ok {
			return o.Vm
		}
	}
	return types.ManagedObjectReference{}
}

// arrive counts a call and returns the rule for it; nil: none.
func (s *Server) arrive(c Call, vm types.ManagedObjectReference) *Rule {
	name := s.nameOf(vm)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[c.Method]++
	for _, r := range slices.Backward(s.rules) {
		if r.method != "" && r.method != c.Method || r.VM != "" && r.VM != name || r.Where != nil && !r.Where(c) {
			continue
		}
		if r.seen++; r.seen <= r.Skip || r.Times > 0 && r.hits == r.Times {
			continue
		}
		r.hits++
		return r
	}
	return nil
}

// parseCall finds the method and the object of a request, and of methods of the NFC service also the
// VM.
func parseCall(body []byte) (Call, error) {
	c := Call{Body: string(body)}
	d := xml.NewDecoder(bytes.NewReader(body))
	inBody := false
	for {
		token, err := d.Token()
		if err != nil {
			return c, fmt.Errorf("the request has no call: %w", err)
		}
		start, ok := token.(xml.StartElement)
		switch {
		case !ok:
		case !inBody:
			inBody = start.Name.Local == "Body"
		case c.Method == "":
			c.Method = start.Name.Local
		case start.Name.Local == "_this":
			if err := decodeReference(d, start, &c.This); err != nil || c.This.Type != "NfcService" {
				return c, err
			}
		case start.Name.Local == "vm":
			err := decodeReference(d, start, &c.vm)
			return c, err
		}
	}
}

func decodeReference(d *xml.Decoder, start xml.StartElement, ref *types.ManagedObjectReference) error {
	for _, a := range start.Attr {
		if a.Name.Local == "type" {
			ref.Type = a.Value
		}
	}
	return d.DecodeElement(&ref.Value, &start)
}

// serve answers a request.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	defer s.begin(0)()
	if !strings.HasPrefix(r.URL.Path, vim25.Path) || r.Method != http.MethodPost {
		s.mux.ServeHTTP(w, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	c, err := parseCall(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	vm := s.vmOf(c)
	rule := s.arrive(c, vm)
	if s.options.Log != nil {
		fmt.Fprintf(s.options.Log, "%s %s %s\n", c.Method, c.This, s.nameOf(vm))
	}
	if rule == nil {
		rule = &Rule{arrived: make(chan struct{})}
	} else if !s.before(w, r, rule) {
		return
	}
	key := pendingKey{vm, c.Method}
	if rule.Task != nil || rule.HangTask {
		s.mu.Lock()
		s.pendingRules[key] = rule
		s.mu.Unlock()
	}
	s.refuseEnded(r)
	answer := httptest.NewRecorder()
	r.Body = io.NopCloser(bytes.NewReader(body))
	s.mux.ServeHTTP(answer, r)
	if rule.Task != nil || rule.HangTask {
		s.mu.Lock()
		if s.pendingRules[key] == rule {
			delete(s.pendingRules, key)
		}
		s.mu.Unlock()
	}
	s.loggedIn(answer)
	rule.happened()
	if rule.Late {
		rule.await(s.closed, r.Context().Done())
	}
	if rule.Cut == After {
		panic(http.ErrAbortHandler)
	}
	text := answer.Body.Bytes()
	maps.Copy(w.Header(), answer.Header())
	w.Header().Set("Content-Type", `text/xml; charset="utf-8"`)
	w.Header().Set("Content-Length", fmt.Sprint(len(text)))
	w.WriteHeader(answer.Code)
	if rule.Truncate {
		w.Write(text[:len(text)/2])
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	w.Write(text)
}

// before does what a rule asks for before the call is executed. It returns false if the call is not
// to be executed.
func (s *Server) before(w http.ResponseWriter, r *http.Request, rule *Rule) bool {
	if rule.Do != nil {
		rule.Do()
	}
	if rule.Hang || rule.Cut == Before || rule.Status != 0 || rule.Soap != nil {
		rule.happened()
	}
	if rule.Hang && !rule.await(s.closed, r.Context().Done()) {
		panic(http.ErrAbortHandler)
	}
	switch {
	case rule.Cut == Before:
		panic(http.ErrAbortHandler)
	case rule.Status != 0:
		http.Error(w, http.StatusText(rule.Status), rule.Status)
		return false
	case rule.Soap != nil:
		writeFault(w, rule.Soap)
		return false
	}
	return true
}

// messageOf returns the text that comes with a fault.
func messageOf(f types.BaseMethodFault) string {
	return "simulated fault " + reflect.TypeOf(f).Elem().Name()
}

// faultDetail is the detail of a fault in an answer: an element with the type of the fault.
type faultDetail struct{ fault types.BaseMethodFault }

func (d faultDetail) MarshalXML(e *govxml.Encoder, start govxml.StartElement) error {
	kind := reflect.TypeOf(d.fault).Elem().Name()
	start.Name.Local = kind + "Fault"
	start.Attr = append(start.Attr,
		govxml.Attr{Name: govxml.Name{Local: "xmlns"}, Value: "urn:" + vim25.Namespace},
		govxml.Attr{Name: govxml.Name{Local: "xsi:type"}, Value: kind})
	return e.EncodeElement(d.fault, start)
}

// writeFault answers a call with a fault.
func writeFault(w http.ResponseWriter, f types.BaseMethodFault) {
	var detail bytes.Buffer
	e := govxml.NewEncoder(&detail)
	if err := e.Encode(faultDetail{f}); err != nil {
		panic(fmt.Sprintf("vspheretest: fault %T: %v", f, err))
	}
	w.Header().Set("Content-Type", `text/xml; charset="utf-8"`)
	w.WriteHeader(http.StatusInternalServerError)
	fmt.Fprintf(w, `%s<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">`+
		`<soapenv:Body><soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>%s</faultstring><detail>%s</detail></soapenv:Fault></soapenv:Body></soapenv:Envelope>`,
		xml.Header, messageOf(f), detail.String())
}
