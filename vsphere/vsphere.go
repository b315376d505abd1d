// Package vsphere talks to a vCenter server or an ESXi host: it logs in, finds virtual machines,
// describes them and makes and removes snapshots. It is the only package that imports govmomi.
//
//	s, err := vsphere.Connect(ctx, vsphere.Options{Server: "vcenter.example.com", User: "backup", Password: secret.New(password)})
//	defer s.Close()
//	vm, err := s.Find(ctx, "web01")
//	d, err := vm.Describe(ctx)
//
// A [Session] is one login, which all callers share.
package vsphere

import (
	"log/slog"
	"time"

	"github.com/vmware/govmomi/vim25"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
)

// Options say how to reach a server and how to log in.
type Options struct {
	Server     string        // host name or address
	Port       uint32        // 0: 443
	User       string        // not needed with a Cookie
	Password   secret.Secret // not needed with a Cookie
	Cookie     secret.Secret // the value of vmware_soap_session of a session that is open; used instead of logging in
	Thumbprint string        // SHA-1 or SHA-256 of the server's certificate; "": the system's authorities must verify it

	Timeout     time.Duration // of one call; 0: 2 minutes
	TaskTimeout time.Duration // how long to wait for a task; 0: 6 hours
	Retry       retry.Policy  // for calls that a lost connection has interrupted
	Log         *slog.Logger  // nil: nothing is logged
}

// Session is an open session on a server. Its methods are safe for concurrent use.
type Session struct {
	Options
	client *vim25.Client
}

// VM is a virtual machine on a server. It implements machine.Machine. Its methods are safe for
// concurrent use.
type VM struct {
	session *Session
	moref   string
}
