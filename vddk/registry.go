package vddk

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
)

// Registry is shared by all disks of one command. It knows which logins a server refused, so that
// repeated attempts do not lock the account. It also knows which VMs were prepared for access with
// VDDK's function PrepareForAccess. This has to be undone with EndAccess after the last disk of a
// VM was closed. A Registry is safe for concurrent use.
type Registry struct {
	refusals int    // refused logins of one account that are allowed
	identity string // names this command to PrepareForAccess

	mu       sync.Mutex
	accounts map[accountKey]*account
	vms      map[vmKey]*preparedVM
}

// NewRegistry returns an empty registry. The parameter refusals limits the logins that fail: if a
// server has refused that many logins of one account without a successful login in between, the
// registry allows no further login of the account. A number less than 1 counts as 1. Servers lock
// accounts after some refused logins, ESXi after five.
func NewRegistry(refusals int) *Registry {
	var unique [4]byte
	rand.Read(unique[:])
	host, _ := os.Hostname()
	return &Registry{
		refusals: max(refusals, 1),
		identity: fmt.Sprintf("vddkcp-%.40s-%d-%s", host, os.Getpid(), hex.EncodeToString(unique[:])),
		accounts: make(map[accountKey]*account), vms: make(map[vmKey]*preparedVM),
	}
}

// LoginError says that no login was attempted, because the server has already refused the same
// login as often as the Registry allows.
type LoginError struct {
	Disk, User, Server string
	Refused            *Error // the error of the login that was refused
}

func (e *LoginError) Error() string {
	return fmt.Sprintf("%s: no login was attempted, because %s refused the login of %q before: %v", e.Disk, e.Server, e.User, e.Refused)
}
func (e *LoginError) Unwrap() error { return e.Refused }

// Hint tells the user what to do about the error.
func (e *LoginError) Hint() string { return e.Refused.Hint() }

// accountKey identifies a login: the server, the user and the password. The password is
// included, so that a login with another password is allowed after refused ones.
type accountKey struct {
	server string
	port   uint32
	user   string
	secret [sha256.Size]byte // hash of the cookie and the password
}

// The method account returns the key of the login that p describes.
func (p *Params) account() accountKey {
	k := accountKey{server: strings.ToLower(strings.TrimSuffix(p.Server, ".")), port: p.Port, user: p.User}
	if k.port == 0 {
		k.port = certificate.DefaultPort
	}
	k.secret = sha256.Sum256(fmt.Appendf(nil, "%d %s %s", len(p.Cookie.Reveal()), p.Cookie.Reveal(), p.Password.Reveal()))
	return k
}

const (
	// provenFor is a duration: for so long after a successful login, other logins of the same
	// account do not wait for each other.
	provenFor = 10 * time.Second
	// Until a login of an account has succeeded, its logins run one at a time, because the server
	// may refuse the password. A login waits for the result of an earlier one until loginWait after
	// the earlier one began: a refusal arrives sooner, and a login that takes longer is only slow.
	loginWait = 30 * time.Second
)

// account has the results of all logins with one accountKey. Its fields are guarded by
// Registry.mu.
type account struct {
	refusals int                   // refused logins since the last successful one
	refused  *Error                // the error of the last refused login
	proven   time.Time             // time of the last successful login
	doubts   int                   // counts the events after which an earlier success proves nothing
	running  map[*attempt]struct{} // the logins that have not ended, except those that are only slow
}

// attempt is one login that has begun.
type attempt struct {
	began  time.Time
	doubts int           // the field doubts of the account when the login began
	ended  chan struct{} // closed when the login has ended
}

// The method login waits until a connection to the disk that p names may log in. Then the caller
// logs in, and calls the returned function with the outcome of that login: nil, or the error that
// prevented it. The error that the method login itself returns is a *LoginError, or the cause of
// ctx.
//
// The logins of an account run one after the other until one has succeeded. Otherwise all
// connections would try a wrong password at the same time. After a connection was lost, a login also
// waits for those that began before the loss.
func (r *Registry) login(ctx context.Context, p *Params) (ended func(error), err error) {
	if !p.Remote() {
		return func(error) {}, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := p.account()
	a := r.accounts[key]
	if a == nil {
		a = &account{running: make(map[*attempt]struct{})}
		r.accounts[key] = a
	}
	for {
		if a.refusals >= r.refusals {
			return nil, &LoginError{Disk: p.File, User: p.User, Server: p.Server, Refused: a.refused}
		}
		proven := !a.proven.IsZero() && time.Since(a.proven) < provenFor
		if proven || len(a.running) == 0 {
			l := &attempt{began: time.Now(), doubts: a.doubts, ended: make(chan struct{})}
			a.running[l] = struct{}{}
			return func(err error) { r.loginEnded(a, l, err) }, nil
		}
		if err := r.waitForLogin(ctx, a); err != nil {
			return nil, err
		}
	}
}

// The method doubt is called when a connection was lost: the server may have closed the connection
// because the account is not valid any more. doubt forgets earlier successful logins of p's
// account. After that, the logins of the account run one after the other again until one has
// succeeded.
func (r *Registry) doubt(p *Params) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.accounts[p.account()]; a != nil {
		a.doubt()
	}
}

func (a *account) doubt() {
	a.proven = time.Time{}
	a.doubts++
}

// waitForLogin waits until one of the running logins of the account a has ended, but not longer than
// until loginWait after the beginning of that login. The caller holds r.mu, which is unlocked during
// the wait.
func (r *Registry) waitForLogin(ctx context.Context, a *account) error {
	var l *attempt
	for l = range a.running {
		break
	}
	r.mu.Unlock()
	timer := time.NewTimer(time.Until(l.began.Add(loginWait)))
	defer timer.Stop()
	select {
	case <-l.ended:
	case <-timer.C:
	case <-ctx.Done():
	}
	r.mu.Lock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	delete(a.running, l) // if the login has not ended, it takes longer than a refusal would
	return nil
}

// loginEnded records err, the result of the login l of the account a. If the field a.doubts has
// changed since l began, another login was refused or a connection was lost in the meantime. Then a
// success is ignored.
func (r *Registry) loginEnded(a *account, l *attempt, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := asError(err); err == nil && a.doubts == l.doubts {
		a.proven, a.refusals = time.Now(), 0
	} else if e != nil && e.loginRefused() {
		a.doubt()
		a.refusals++
		a.refused = e
	}
	delete(a.running, l)
	close(l.ended)
}

// errNoLogin is passed to Registry as the result of a login that was successful, but was made for a
// call that opens no disk, such as EndAccess. Opening a disk may need other permissions than that
// call. So the success does not prove that the next login for opening a disk will succeed, and
// Registry must not record it as a success.
var errNoLogin = errors.New("the login succeeded, but it opened no disk and does not show that a disk can be opened")

// vmKey identifies a VM on a server.
type vmKey struct {
	server string
	port   uint32
	vm     string
}

// preparedVM is a VM that is prepared for access or will be. It has the number of disks of the VM
// that are open, and of those that will be opened. Its fields are guarded by lock, which is also
// held during PrepareForAccess and EndAccess.
type preparedVM struct {
	lock     chan struct{} // a mutex: has one element while it is unlocked
	disks    int           // disks that are open
	expected int           // calls of Expect without a call of Done
	prepared bool          // EndAccess must be called after the last disk
	end      func()        // calls EndAccess; nil until a disk was closed
}

// The method prepare makes sure that the VM of p is prepared for access, and counts the disk. For
// the first disk of the VM, it calls prepareVM, which calls PrepareForAccess. The result of
// prepareVM is true if the VM is prepared now, or if that is not known because the call ended
// without an answer. prepare returns an error only if ctx ends; the error is the cause of ctx.
func (r *Registry) prepare(ctx context.Context, p *Params, prepareVM func() bool) error {
	vm := r.vm(p)
	select {
	case <-vm.lock:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { vm.lock <- struct{}{} }()
	if vm.disks == 0 && !vm.prepared {
		vm.prepared = prepareVM()
	}
	vm.disks++
	return nil
}

// The method vm returns the entry of the registry for the VM that p names. If there is no such
// entry, vm adds it.
func (r *Registry) vm(p *Params) *preparedVM {
	account := p.account()
	key := vmKey{account.server, account.port, p.VM}
	r.mu.Lock()
	defer r.mu.Unlock()
	vm := r.vms[key]
	if vm == nil {
		vm = &preparedVM{lock: make(chan struct{}, 1)}
		vm.lock <- struct{}{}
		r.vms[key] = vm
	}
	return vm
}

// Expect announces that the disk that p names will be opened later, perhaps more than once. A
// prepared VM stays prepared until Done is called. Expect and Done use only the fields Server,
// Port, VM and PrepareAccess of p.
func (r *Registry) Expect(p *Params) {
	if !p.PrepareAccess || !p.Remote() {
		return
	}
	vm := r.vm(p)
	<-vm.lock
	vm.expected++
	vm.lock <- struct{}{}
}

// Done undoes one call of Expect: the disk will not be opened any more. If no other disk of its VM
// is open or expected, and the VM is known or suspected to be prepared, Done calls EndAccess, which
// takes up to 30 s.
func (r *Registry) Done(p *Params) {
	if !p.PrepareAccess || !p.Remote() {
		return
	}
	vm := r.vm(p)
	<-vm.lock
	defer func() { vm.lock <- struct{}{} }()
	vm.expected--
	vm.endIfLast()
}

// endIfLast calls EndAccess if no disk of the VM is open or expected, and the VM is known or
// suspected to be prepared. The caller holds vm.lock.
func (vm *preparedVM) endIfLast() {
	if vm.disks == 0 && vm.expected <= 0 && vm.prepared && vm.end != nil {
		vm.prepared = false
		vm.end()
	}
}

// The method release undoes a call of prepare. It is called when the disk is closed. The parameter
// endAccess is a function that calls EndAccess. release calls this function if no other disk of the
// VM is open or expected, and the VM is known or suspected to be prepared.
func (r *Registry) release(p *Params, endAccess func()) {
	vm := r.vm(p)
	<-vm.lock
	defer func() { vm.lock <- struct{}{} }()
	vm.disks--
	vm.end = endAccess
	vm.endIfLast()
}
