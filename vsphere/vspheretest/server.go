package vspheretest

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vddk/testlib"
)

// Server is a simulated vCenter server that listens on the loopback interface. Its methods are safe
// for concurrent use. Methods that name a VM which does not exist panic: the test is wrong.
type Server struct {
	Host           string
	Port           uint32
	User, Password string
	URL            *url.URL         // of the SDK, with user and password, for govmomi and govc
	Library        *testlib.Library // the stand-in library; nil without WithLibrary

	options  Options
	model    *simulator.Model
	listener net.Listener
	http     *http.Server
	mux      http.Handler
	closed   chan struct{}
	nfc      nfcHosts

	state // guarded by its mutex
}

// state is the part of a Server that changes while the server runs.
type state struct {
	mu           sync.Mutex
	idle         sync.Cond // signals that running is 0
	running      int       // tasks and calls
	runningTasks int
	certificate  tls.Certificate
	down         bool
	conns        map[net.Conn]bool
	calls        map[string]int
	rules        []*Rule
	machines     map[types.ManagedObjectReference]*machine
	wrapped      map[types.ManagedObjectReference][]*simulator.Registry // sessions that have wrappers of an object
	busy         map[types.ManagedObjectReference]types.ManagedObjectReference
	revoked      map[string]bool
	ended        map[string]bool // keys of the sessions that EndSessions has ended
	dirs         map[string]bool // folders of VMs
	images       int             // made so far
	snapshotID   int32
	changes      int // number of changes of configurations
	pendingRules map[pendingKey]*Rule
}

// New starts a server for a test and ends it with the test. Options are VMs, hosts, datastores and
// the results of WithLibrary, WithNFC and Configure. The test fails if a client of an NFC service did
// something wrong or has left a connection open.
func New(t testing.TB, options ...Option) *Server {
	t.Helper()
	var o Options
	for _, option := range options {
		option.apply(&o)
	}
	var library *testlib.Library
	if o.LibDir == wanted {
		library = testlib.New(t)
		o.LibDir, o.Dir = library.Dir, wanted
	}
	if o.Dir == wanted {
		o.Dir = t.TempDir()
	}
	s, err := Start(o)
	if err != nil {
		t.Fatalf("starting the simulated vCenter server: %v", err)
	}
	t.Cleanup(func() {
		s.nfc.check(t)
		s.Close()
	})
	s.Library = library
	return s
}

// Start starts a server.
func Start(o Options) (*Server, error) {
	if o.User == "" {
		o.User, o.Password = DefaultUser, DefaultPassword
	}
	s := &Server{Host: "127.0.0.1", User: o.User, Password: o.Password, options: o, closed: make(chan struct{})}
	s.idle.L = &s.mu
	s.conns = map[net.Conn]bool{}
	s.calls = map[string]int{}
	s.dirs = map[string]bool{}
	s.machines = map[types.ManagedObjectReference]*machine{}
	s.wrapped = map[types.ManagedObjectReference][]*simulator.Registry{}
	s.busy = map[types.ManagedObjectReference]types.ManagedObjectReference{}
	s.revoked = map[string]bool{}
	s.nfc.hosts = map[types.ManagedObjectReference]*nfcHost{}
	s.pendingRules = map[pendingKey]*Rule{}
	s.model = simulator.VPX()
	s.model.Datacenter, s.model.Datastore, s.model.Machine = 0, 0, 0
	if err := s.create(); err != nil {
		return nil, err
	}
	if err := s.start(); err != nil {
		s.model.Remove()
		return nil, err
	}
	return s, nil
}

// The mutex creating is held while an inventory is made: the simulator then changes variables that
// all simulators of a process share.
var creating sync.Mutex

func (s *Server) create() error {
	creating.Lock()
	defer creating.Unlock()
	if err := s.model.Create(); err != nil {
		return err
	}
	if err := s.build(); err != nil {
		s.model.Remove()
		return err
	}
	return nil
}

func (s *Server) start() error {
	s.RenewCertificate()
	l, err := net.Listen("tcp", s.Host+":0")
	if err != nil {
		return err
	}
	s.Port = uint32(l.Addr().(*net.TCPAddr).Port)
	address := net.JoinHostPort(s.Host, strconv.Itoa(int(s.Port)))
	s.URL = &url.URL{Scheme: "https", Host: address, Path: "/sdk", User: url.UserPassword(s.User, s.Password)}

	service := s.model.Service
	service.Listen = s.URL
	registry := s.model.Map()
	service.RegisterSDK(registry, registry.Path+"/vimService")
	service.ServeMux.HandleFunc(registry.Path+"/vimServiceVersions.xml", service.ServiceVersions)
	manager := registry.SessionManager()
	manager.ServiceHostName = address
	s.about()
	registry.Handler = s.handler
	registry.AddHandler(&watcher{s})
	registry.Put(s.newNFCService())
	s.mux = service.ServeMux
	s.listener = l
	config := &tls.Config{
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			c := s.certificate
			return &c, nil
		},
	}
	s.http = &http.Server{
		Handler:   http.HandlerFunc(s.serve),
		ErrorLog:  log.New(errorLog{}, "vspheretest: ", 0),
		ConnState: s.connState,
	}
	go s.http.Serve(tls.NewListener(&door{l, s}, config))
	return nil
}

// errorLog prints errors of the HTTP server, such as panics of the simulator, but not those of
// handshakes, which tests break off.
type errorLog struct{}

func (errorLog) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("TLS handshake error")) {
		return len(p), nil
	}
	return os.Stderr.Write(p)
}

// about sets what the server says about itself.
func (s *Server) about() {
	registry := s.model.Map()
	instance := registry.Get(vim25.ServiceInstance).(*simulator.ServiceInstance)
	instance.Content.About.InstanceUuid = uuidOf("vcenter")
	if s.options.IdleLimit > 0 {
		registry.OptionManager().UpdateOptions(&types.UpdateOptions{ChangedValue: []types.BaseOptionValue{
			&types.OptionValue{Key: "config.vmacore.soap.sessionTimeout", Value: s.options.IdleLimit.String()},
		}})
	}
	if s.options.ESXi {
		instance.Content.About.ApiType = "HostAgent"
	}
	if v := s.options.Version; v != "" {
		about := &instance.Content.About
		about.FullName = strings.Replace(about.FullName, about.Version, v, 1)
		about.Version, about.ApiVersion = v, v
	}
	for _, e := range registry.All("HostSystem") {
		host := e.(*simulator.HostSystem)
		host.Summary.ManagementServerIp = s.options.ManagedBy
		if v := s.options.Version; v != "" && host.Summary.Config.Product != nil {
			product := *host.Summary.Config.Product
			product.Version, product.ApiVersion = v, v
			host.Summary.Config.Product = &product
		}
	}
}

// Close ends the server. Calls and tasks that hang are released.
func (s *Server) Close() {
	s.mu.Lock()
	select {
	case <-s.closed:
		s.mu.Unlock()
		return
	default:
	}
	close(s.closed)
	s.mu.Unlock()
	s.http.Close()
	s.nfc.close()
	s.mu.Lock()
	for s.running > 0 {
		s.idle.Wait()
	}
	s.mu.Unlock()
	s.model.Remove()
}

// begin counts a call or a task that runs. The function that it returns ends it.
func (s *Server) begin(task int) (end func()) {
	add := func(n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.running += n
		s.runningTasks += n * task
		s.idle.Broadcast()
	}
	add(1)
	return func() { add(-1) }
}

// Settle waits until no task runs. It waits for tasks that hang, too.
func (s *Server) Settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.runningTasks > 0 {
		s.idle.Wait()
	}
}

// door is the listener of a server. While the server is down, it resets new connections.
type door struct {
	net.Listener
	s *Server
}

func (d *door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		d.s.mu.Lock()
		down := d.s.down
		d.s.mu.Unlock()
		if !down {
			return c, nil
		}
		reset(c)
	}
}

func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	c.Close()
}

func (s *Server) connState(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.conns[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, c)
	}
}

// CutConnections closes all connections, those with calls in progress too.
func (s *Server) CutConnections() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if t, ok := c.(*tls.Conn); ok {
			reset(t.NetConn())
		} else {
			c.Close()
		}
	}
}

// Stop makes the server unreachable: connections are closed, and new ones are reset.
func (s *Server) Stop() {
	s.mu.Lock()
	s.down = true
	s.mu.Unlock()
	s.CutConnections()
}

// Resume makes a stopped server reachable again.
func (s *Server) Resume() {
	s.mu.Lock()
	s.down = false
	s.mu.Unlock()
}

// Restart does what a restart of vCenter does: connections are closed, and the server has forgotten
// its sessions and the tasks that have ended. Snapshots stay.
func (s *Server) Restart() {
	s.Stop()
	s.EndSessions()
	ctx := s.context()
	for _, o := range ctx.Map.AllReference("Task") {
		if task := o.(*simulator.Task); s.finished(task) {
			ctx.Map.Remove(ctx, task.Reference())
		}
	}
	for _, e := range ctx.Map.All("VirtualMachine") {
		ctx.WithLock(e, func() {
			ctx.Update(e, []types.PropertyChange{{Name: "recentTask", Val: []types.ManagedObjectReference{}}})
		})
	}
	s.Resume()
}

func (s *Server) finished(task *simulator.Task) bool {
	var done bool
	ctx := s.context()
	ctx.WithLock(task, func() {
		done = task.Info.State == types.TaskInfoStateSuccess || task.Info.State == types.TaskInfoStateError
	})
	return done
}

// context returns a new context for changes of the simulator's objects. Two goroutines must not
// share a context: objects that one of them has locked are not locked for the other one.
func (s *Server) context() *simulator.Context {
	c := *s.model.Service.Context
	c.Context = context.Background()
	return &c
}

// Session is an open session.
type Session struct {
	Key, User, Agent string
	Calls            int
}

func (s Session) String() string { return fmt.Sprintf("%s %s %d calls", s.User, s.Agent, s.Calls) }

// Sessions returns the open sessions, the oldest first.
func (s *Server) Sessions() []Session {
	var list []Session
	for _, u := range s.sessions() {
		list = append(list, Session{Key: u.Key, User: u.UserName, Agent: u.UserAgent, Calls: int(u.CallCount)})
	}
	return list
}

func (s *Server) sessions() []types.UserSession {
	var manager mo.SessionManager
	err := mo.RetrieveProperties(context.Background(), s.model.Service, s.model.ServiceContent.PropertyCollector,
		s.model.Map().SessionManager().Reference(), &manager)
	if err != nil {
		panic(fmt.Sprintf("vspheretest: reading the sessions: %v", err)) // never: the call stays in this process
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	manager.SessionList = slices.DeleteFunc(manager.SessionList, func(u types.UserSession) bool { return s.ended[u.Key] })
	slices.SortFunc(manager.SessionList, func(a, b types.UserSession) int { return a.LoginTime.Compare(b.LoginTime) })
	return manager.SessionList
}

// EndSessions ends all sessions. Their next calls fail with NotAuthenticated.
func (s *Server) EndSessions() {
	var keys []string
	for _, u := range s.sessions() {
		keys = append(keys, u.Key)
	}
	s.mu.Lock()
	if s.ended == nil {
		s.ended = make(map[string]bool)
	}
	for _, key := range keys {
		s.ended[key] = true
	}
	s.mu.Unlock()
	for _, key := range keys {
		methods.TerminateSession(context.Background(), s.model.Service, &types.TerminateSession{
			This: s.model.Map().SessionManager().Reference(), SessionId: []string{key},
		}) // fails if the session has ended meanwhile
	}
	s.allowCookie("ended")
}

// now is the time for objects of the inventory.
func now() time.Time { return time.Now().UTC() }
