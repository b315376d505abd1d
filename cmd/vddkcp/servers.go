package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vddk"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// The type servers holds what the disks of VMs share in one run of vddkcp: one session for
// each login, one snapshot for each VM, and one budget for each ESXi host. It is safe for
// concurrent use.
type servers struct {
	snapshots machine.Snapshots

	mu       sync.Mutex
	sessions map[sessionKey]*serverSession
	budgets  map[string]*vddk.Budget // by the name of the ESXi host
	limits   batch.Limits            // of a batch, for budgets
	log      *slog.Logger            // of a batch, because a session is used by several jobs; nil: the log of the first caller
	registry *vddk.Registry          // nil until it is needed
	vms      map[foundVM]*vsphere.VM // VMs that were found
	standing map[string]string       // names of VMs, by the names of the snapshots that exist or may exist
	logged   map[string]bool         // lines that logOnce has logged
	hosts    *nfc.Hosts              // nil until it is needed
	trace    *nfcTrace               // of --nfc-trace; nil until it is needed
	left     []error                 // why snapshots could not be removed after their disks were closed
}

// sessionKey identifies a login.
type sessionKey struct {
	server, user     string
	port             uint32
	password, cookie string
}

// serverSession is a session that is open, or is being opened.
type serverSession struct {
	lock    chan struct{} // a mutex: has one element while it is unlocked
	session *vsphere.Session
	refused error // of the login, which must not be repeated
}

// The method session returns the session for the login that the flags describe. It logs in if
// there is none yet.
func (s *servers) session(ctx context.Context, f *serverFlags, o sessionOptions) (*vsphere.Session, error) {
	options, err := f.connection(ctx, o.warn)
	if err != nil {
		return nil, err
	}
	if s.log != nil {
		o.log, o.retry.OnRetry = s.log, retry.LogTo(s.log, askedAgain)
	}
	options.Timeout, options.TaskTimeout, options.Retry, options.Log = o.timeout, o.taskTimeout, o.retry.Policy(), o.log
	options.Poll = killpoint.Poll()
	options.UserAgent = "vddkcp/" + programVersion()
	key := sessionKey{options.Server, options.User, options.Port, options.Password.Reveal(), options.Cookie.Reveal()}
	s.mu.Lock()
	if s.sessions == nil {
		s.sessions = map[sessionKey]*serverSession{}
	}
	entry := s.sessions[key]
	if entry == nil {
		entry = &serverSession{lock: make(chan struct{}, 1)}
		entry.lock <- struct{}{}
		s.sessions[key] = entry
	}
	s.mu.Unlock()
	select {
	case <-entry.lock:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { entry.lock <- struct{}{} }()
	if entry.session != nil || entry.refused != nil {
		return entry.session, entry.refused
	}
	entry.session, err = vsphere.Connect(ctx, options)
	if errors.As(err, new(*vsphere.LoginError)) {
		entry.refused = err
	}
	return entry.session, err
}

// sessionOptions are options of a session that do not decide which session is used.
type sessionOptions struct {
	timeout, taskTimeout time.Duration
	retry                source.RetryOptions
	log                  *slog.Logger
	warn                 func(string)
}

// The method budget returns the limits for memory and connections on an ESXi host, which all
// disks on this host share.
func (s *servers) budget(host string) *vddk.Budget {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.budgets == nil {
		s.budgets = map[string]*vddk.Budget{}
	}
	if s.budgets[host] == nil {
		limits := s.limits.WithDefaults()
		s.budgets[host] = vddk.NewHostBudget(limits.NFCBuffer, limits.Connections)
	}
	return s.budgets[host]
}

// askedAgain is the message about a call to a server that is repeated.
const askedAgain = "the server is asked again"

// The method serveBatch sets the limits and the log of a batch, before the first job begins.
func (s *servers) serveBatch(limits batch.Limits, log *slog.Logger) { s.limits, s.log = limits, log }

// foundVM identifies a VM by its name on the command line.
type foundVM struct {
	session *vsphere.Session
	name    string
}

// The method find finds a VM. It remembers the result, because a batch may have a job for each
// disk of a VM, and the server takes some time to search all names.
func (s *servers) find(ctx context.Context, session *vsphere.Session, name string) (*vsphere.VM, error) {
	key := foundVM{session, name}
	s.mu.Lock()
	vm := s.vms[key]
	s.mu.Unlock()
	if vm != nil {
		return vm, nil
	}
	vm, err := session.Find(ctx, name)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.vms == nil {
		s.vms = map[foundVM]*vsphere.VM{}
	}
	s.vms[key] = vm
	return vm, nil
}

// The method logins returns the registry of refused logins of VDDK.
func (s *servers) logins() *vddk.Registry {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.registry == nil {
		s.registry = vddk.NewRegistry(1)
	}
	return s.registry
}

// The method stands records that a VM has, or may have, a snapshot of this run, or that the
// snapshot is gone.
func (s *servers) stands(vm, snapshot string, stands bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.standing == nil {
		s.standing = map[string]string{}
	}
	if stands {
		s.standing[snapshot] = vm
	} else {
		delete(s.standing, snapshot)
	}
}

// The method abandon tells the user which snapshots stay on the server, because a second
// signal ends vddkcp at once. It waits for nobody who holds the lock.
func (s *servers) abandon(log *slog.Logger) {
	if !s.mu.TryLock() {
		return
	}
	for _, snapshot := range slices.Sorted(maps.Keys(s.standing)) {
		log.Warn(fmt.Sprintf("the snapshot %s of the VM %s may still be on the server: remove it with: vddkcp cleanup --remove --older-than 0s %s",
			printable.Name(snapshot), printable.Name(s.standing[snapshot]), printable.Line(printable.Word(s.standing[snapshot]))))
	}
}

// The method closed records the error of closing a disk of a VM.
func (s *servers) closed(err error) {
	if !errors.As(err, new(*inventory.LeftError)) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = append(s.left, err)
}

// The method close logs out of all servers. It returns an error if a snapshot could not be
// removed after its disk was closed. If it cannot log out, it only warns the user.
func (s *servers) close(warn func(string)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, entry := range s.sessions {
		<-entry.lock
		if entry.session == nil {
			continue
		}
		if err := entry.session.Close(); err != nil {
			warn(err.Error())
		}
	}
	s.sessions = nil
	if len(s.left) == 0 {
		return s.trace.close()
	}
	return errors.Join(&leftError{errors.Join(s.left...)}, s.trace.close())
}

// The method logOnce logs a line, unless it has logged the same line before. In a batch, the log is
// that of the whole batch.
func (s *servers) logOnce(log *slog.Logger, level slog.Level, line string) {
	s.mu.Lock()
	seen := s.logged[line]
	if s.logged == nil {
		s.logged = map[string]bool{}
	}
	s.logged[line] = true
	s.mu.Unlock()
	if s.log != nil {
		log = s.log
	}
	if !seen {
		log.Log(context.Background(), level, line)
	}
}

// The method nfcHosts returns what is known about the hosts that disks are read from over NFC.
func (s *servers) nfcHosts() *nfc.Hosts {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hosts == nil {
		s.hosts = nfc.NewHosts()
	}
	return s.hosts
}

// nfcTrace is the file of --nfc-trace.
type nfcTrace struct {
	*nfc.Trace
	file *os.File
}

// The method nfcTrace returns the trace that is written to the given file. The first call creates
// the file. If the path is "", the result is nil.
func (s *servers) nfcTrace(path string) (*nfc.Trace, error) {
	if path == "" {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trace == nil {
		file, err := createPrivate(path)
		if err != nil {
			return nil, usage.Errorf("--nfc-trace: %w", err)
		}
		s.trace = &nfcTrace{nfc.NewTrace(file), file}
	}
	return s.trace.Trace, nil
}

// createPrivate creates a file that only its owner can read. It replaces the content and the mode
// of a regular file that exists, but opens other files, such as a pipe, as they are.
func createPrivate(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.Mode().IsRegular() {
		if info.Mode() != 0o600 {
			err = file.Chmod(0o600)
		}
		err = cmp.Or(err, file.Truncate(0))
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// The method close closes the file of a trace. The trace may be nil.
func (t *nfcTrace) close() error {
	if t == nil {
		return nil
	}
	if err := cmp.Or(t.Err(), t.file.Close()); err != nil {
		return fmt.Errorf("--nfc-trace: %w", err)
	}
	return nil
}

// leftError says that a command has done its work, but that a snapshot of it is still on the
// server.
type leftError struct{ error }

func (e *leftError) Unwrap() error { return e.error }

// ExitStatus returns the exit status for the error. Package report calls this method.
func (*leftError) ExitStatus() int { return exit.Left }

// Done tells package report that the work is done.
func (*leftError) Done() bool { return true }
