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

// Registry holds what the disks of one command have in common: which logins a
// server refused, and which VMs are prepared for access. A command creates one and
// hands it to all its disks. It is safe for concurrent use.
type Registry struct {
	refusals int
	identity string // of this command, for PrepareForAccess

	mu       sync.Mutex
	accounts map[accountKey]*account
	vms      map[vmKey]*preparedVM
}

// NewRegistry returns an empty registry. After refusals refused logins of one
// account without a login that succeeded, it allows no more of them: servers lock
// accounts (ESXi after five).
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

// LoginError is a login that was not made because the server refused the same one
// before.
type LoginError struct {
	Disk, User, Server string
	Refused            *Error // the server's answer
}

func (e *LoginError) Error() string {
	return fmt.Sprintf("%s: %s refused the login of %q before, and is not asked again: %v", e.Disk, e.Server, e.User, e.Refused)
}
func (e *LoginError) Unwrap() error { return e.Refused }

// Hint says what to do about it.
func (e *LoginError) Hint() string { return e.Refused.Hint() }

// accountKey identifies a login: with another password another attempt is allowed.
type accountKey struct {
	server string
	port   uint32
	user   string
	secret [sha256.Size]byte
}

func (p *Params) account() accountKey {
	k := accountKey{server: strings.ToLower(strings.TrimSuffix(p.Server, ".")), port: p.Port, user: p.User}
	if k.port == 0 {
		k.port = DefaultPort
	}
	k.secret = sha256.Sum256(fmt.Appendf(nil, "%d %s %s", len(p.Cookie.Reveal()), p.Cookie.Reveal(), p.Password.Reveal()))
	return k
}

const (
	// provenFor is how long after a login that succeeded others are made without
	// waiting for each other.
	provenFor = 10 * time.Second
	// aloneFor is how long the others wait for a login whose result would tell
	// whether the server accepts theirs: refusals come sooner.
	aloneFor = 30 * time.Second
)

// account is what is known of the logins with one accountKey. Its fields are
// guarded by Registry.mu.
type account struct {
	refusals int
	refused  *Error        // the last refusal
	proven   time.Time     // when a login succeeded last
	doubts   int           // counts what makes earlier successes worth nothing
	trying   chan struct{} // closed when the login that the others wait for has ended; nil: there is none
}

// login waits until the disk with parameters p may log in. The function that it
// returns must be called with the login's result: nil, or the error of whatever
// failed. The error of login is a *LoginError, or the cause of ctx.
//
// Until a login has succeeded they are made one after the other, because a wrong
// password must not be tried by all connections at once.
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

// doubt makes the next login of p's account be waited for by the others, although
// one succeeded not long ago. It is called when a connection was lost, which may
// have been for the same reason that logins are refused for.
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

// waitForLogin waits until the login that others wait for has ended, or has taken
// too long. The caller holds r.mu, which is released meanwhile.
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
	if a.trying == trying { // it takes long, which a refusal does not
		a.trying = nil
	}
	return nil
}

// ender returns the function that notes the result of a login which begins now.
// Trying is the channel that others wait for, or nil. The caller holds r.mu.
func (r *Registry) ender(a *account, trying chan struct{}) func(error) {
	doubts := a.doubts
	return func(err error) { r.loginEnded(a, trying, doubts, err) }
}

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

// errNoLogin is the result of a login that says nothing about those of disks.
var errNoLogin = errors.New("not the login of a disk")

// vmKey identifies a VM on a server.
type vmKey struct {
	server string
	port   uint32
	vm     string
}

// preparedVM counts the disks of a VM that are open or about to be. Its fields are
// guarded by the token in turn.
type preparedVM struct {
	turn     chan struct{} // holds a token while nobody calls PrepareForAccess or EndAccess
	disks    int
	expected int    // disks that Expect announced and Done did not take back
	prepared bool   // EndAccess is due after the last disk
	end      func() // calls EndAccess; nil: a disk is open, or none was
}

// prepare makes sure that the VM of p was prepared for access, and counts the
// disk. Call is called for the first disk of the VM alone; it reports whether the
// VM may be prepared now. The error is the cause of ctx.
func (r *Registry) prepare(ctx context.Context, p *Params, call func() bool) error {
	vm := r.vm(p)
	select {
	case <-vm.turn:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { vm.turn <- struct{}{} }()
	if vm.disks == 0 && !vm.prepared {
		vm.prepared = call()
	}
	vm.disks++
	return nil
}

func (r *Registry) vm(p *Params) *preparedVM {
	account := p.account()
	key := vmKey{account.server, account.port, p.VM}
	r.mu.Lock()
	defer r.mu.Unlock()
	vm := r.vms[key]
	if vm == nil {
		vm = &preparedVM{turn: make(chan struct{}, 1)}
		vm.turn <- struct{}{}
		r.vms[key] = vm
	}
	return vm
}

// Expect announces a disk that is to be opened later, maybe more than once: until
// Done is called the VM stays prepared, once it is. Of p only Server, Port, VM and
// PrepareAccess matter.
func (r *Registry) Expect(p *Params) {
	if !p.PrepareAccess || !p.Remote() {
		return
	}
	vm := r.vm(p)
	<-vm.turn
	vm.expected++
	vm.turn <- struct{}{}
}

// Done takes an Expect back, when the disk will not be opened any more. It calls
// EndAccess where that was the last disk of its VM, which takes 30 s at most.
func (r *Registry) Done(p *Params) {
	if !p.PrepareAccess || !p.Remote() {
		return
	}
	vm := r.vm(p)
	<-vm.turn
	defer func() { vm.turn <- struct{}{} }()
	vm.expected--
	vm.endIfLast()
}

// endIfLast calls EndAccess where no disk is open or expected. The caller has the
// turn.
func (vm *preparedVM) endIfLast() {
	if vm.disks == 0 && vm.expected <= 0 && vm.prepared && vm.end != nil {
		vm.prepared = false
		vm.end()
	}
}

// release undoes a prepare that returned nil, when the disk is closed. Call is
// called after the last disk of a VM that may be prepared.
func (r *Registry) release(p *Params, call func()) {
	vm := r.vm(p)
	<-vm.turn
	defer func() { vm.turn <- struct{}{} }()
	vm.disks--
	vm.end = call
	vm.endIfLast()
}
