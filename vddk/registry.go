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
)

// Registry is shared by all disks of one command. It knows which logins a server refused, so
// that an account is not locked, and which VMs were prepared for access. It is safe for
// concurrent use.
type Registry struct {
	refusals int    // refused logins of one account that are allowed
	identity string // names this command to PrepareForAccess

	mu       sync.Mutex
	accounts map[accountKey]*account
	vms      map[vmKey]*preparedVM
}

// NewRegistry returns an empty registry. When a server has refused the given number of logins of
// one account, without a successful login in between, the registry allows no more logins of the
// account. refusals is raised to 1 if it is less. Servers lock accounts after some refused
// logins, ESXi after five.
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

// LoginError says that no login was attempted, because the server refused the same login
// before.
type LoginError struct {
	Disk, User, Server string
	Refused            *Error // the error of the login that was refused
}

func (e *LoginError) Error() string {
	return fmt.Sprintf("%s: no login was attempted, because %s refused the login of %q before: %v", e.Disk, e.Server, e.User, e.Refused)
}
func (e *LoginError) Unwrap() error { return e.Refused }

// Hint returns what the user can do about the error.
func (e *LoginError) Hint() string { return e.Refused.Hint() }

// accountKey identifies a login. It includes the password, so that a login with another
// password is allowed.
type accountKey struct {
	server string
	port   uint32
	user   string
	secret [sha256.Size]byte // hash of the cookie and the password
}

// account returns the key of the login with p.
func (p *Params) account() accountKey {
	k := accountKey{server: strings.ToLower(strings.TrimSuffix(p.Server, ".")), port: p.Port, user: p.User}
	if k.port == 0 {
		k.port = DefaultPort
	}
	k.secret = sha256.Sum256(fmt.Appendf(nil, "%d %s %s", len(p.Cookie.Reveal()), p.Cookie.Reveal(), p.Password.Reveal()))
	return k
}

const (
	// provenFor is the time after a successful login in which logins of the same account do
	// not wait for each other.
	provenFor = 10 * time.Second
	// aloneFor is the longest time that logins wait for the result of another one. A server
	// refuses a login sooner than that.
	aloneFor = 30 * time.Second
)

// account has the results of the logins with one accountKey. Its fields are guarded by
// Registry.mu.
type account struct {
	refusals int           // refused logins since the last successful one
	refused  *Error        // the error of the last refused login
	proven   time.Time     // time of the last successful login
	doubts   int           // counts the events after which an earlier success proves nothing
	trying   chan struct{} // closed when the login that others wait for has ended; nil if there is none
}

// login waits until the disk with parameters p may log in. The caller must call ended with the
// result of the login: nil, or any error that prevented it. The error of login is a
// *LoginError, or the cause of ctx.
//
// Logins run one after the other until one has succeeded, so that not all connections try a
// wrong password at the same time.
func (r *Registry) login(ctx context.Context, p *Params) (ended func(error), err error) {
	if !p.Remote() {
		return func(error) {}, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := p.account()
	a := r.accounts[key]
	if a == nil {
		a = new(account)
		r.accounts[key] = a
	}
	for {
		if a.refusals >= r.refusals {
			return nil, &LoginError{Disk: p.File, User: p.User, Server: p.Server, Refused: a.refused}
		}
		if !a.proven.IsZero() && time.Since(a.proven) < provenFor {
			return r.ender(a, nil), nil
		}
		if a.trying == nil {
			mine := make(chan struct{})
			a.trying = mine
			return r.ender(a, mine), nil
		}
		if err := r.waitForLogin(ctx, a); err != nil {
			return nil, err
		}
	}
}

// doubt makes other logins of p's account wait for the next one, although a login succeeded not
// long ago. It is called when a connection was lost, since the server may have closed it
// because the account is not valid any more.
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

// waitForLogin waits until the login that others wait for has ended, or aloneFor is over. The
// caller holds r.mu, which is unlocked during the wait.
func (r *Registry) waitForLogin(ctx context.Context, a *account) error {
	trying := a.trying
	r.mu.Unlock()
	timer := time.NewTimer(aloneFor)
	defer timer.Stop()
	select {
	case <-trying:
	case <-timer.C:
	case <-ctx.Done():
	}
	r.mu.Lock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if a.trying == trying { // it takes longer than a refusal does
		a.trying = nil
	}
	return nil
}

// ender returns the function that records the result of a login that begins now. trying is the
// channel that others wait for, or nil. The caller holds r.mu.
func (r *Registry) ender(a *account, trying chan struct{}) func(error) {
	doubts := a.doubts
	return func(err error) { r.loginEnded(a, trying, doubts, err) }
}

// loginEnded records the result err of a login that began when a had the given number of doubts.
func (r *Registry) loginEnded(a *account, trying chan struct{}, doubts int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := asError(err); err == nil && a.doubts == doubts {
		a.proven, a.refusals = time.Now(), 0
	} else if e != nil && e.loginRefused() {
		a.doubt()
		a.refusals++
		a.refused = e
	}
	if trying == nil {
		return
	}
	if a.trying == trying {
		a.trying = nil
	}
	close(trying)
}

// errNoLogin is recorded as the result of a successful login that was not made to open a disk,
// which may need other permissions.
var errNoLogin = errors.New("the login was not made to open a disk")

// vmKey identifies a VM on a server.
type vmKey struct {
	server string
	port   uint32
	vm     string
}

// preparedVM counts the disks of a VM that are open or expected to be opened. Its fields are
// guarded by lock, which is also held during PrepareForAccess and EndAccess.
type preparedVM struct {
	lock     chan struct{} // a mutex: has one element while it is unlocked
	disks    int           // disks that are open
	expected int           // calls of Expect without a call of Done
	prepared bool          // EndAccess must be called after the last disk
	end      func()        // calls EndAccess; nil until a disk was closed
}

// prepare makes sure that the VM of p was prepared for access, and counts the disk. It calls
// call only for the first disk of the VM; call reports whether the VM may be prepared now.
// prepare returns an error only if ctx ends: the cause of ctx.
func (r *Registry) prepare(ctx context.Context, p *Params, call func() bool) error {
	vm := r.vm(p)
	select {
	case <-vm.lock:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { vm.lock <- struct{}{} }()
	if vm.disks == 0 && !vm.prepared {
		vm.prepared = call()
	}
	vm.disks++
	return nil
}

// vm returns the VM of p, which it adds if needed.
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

// Expect announces a disk that will be opened later, possibly more than once. A VM that is
// prepared stays so until Done is called. Expect and Done use only the fields Server, Port, VM
// and PrepareAccess of p.
func (r *Registry) Expect(p *Params) {
	if !p.PrepareAccess || !p.Remote() {
		return
	}
	vm := r.vm(p)
	<-vm.lock
	vm.expected++
	vm.lock <- struct{}{}
}

// Done ends an Expect when the disk will not be opened any more. If it was the last disk of its
// VM, Done calls EndAccess, which takes up to 30 s.
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

// endIfLast calls EndAccess if no disk is open or expected. The caller holds vm.lock.
func (vm *preparedVM) endIfLast() {
	if vm.disks == 0 && vm.expected <= 0 && vm.prepared && vm.end != nil {
		vm.prepared = false
		vm.end()
	}
}

// release is called once for each prepare that returned nil, when the disk is closed. It calls
// call after the last disk of a VM that may be prepared.
func (r *Registry) release(p *Params, call func()) {
	vm := r.vm(p)
	<-vm.lock
	defer func() { vm.lock <- struct{}{} }()
	vm.disks--
	vm.end = call
	vm.endIfLast()
}
