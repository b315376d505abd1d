package vsphere_test

import (
	"testing"

	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// TestEndSession ends a session by its key, as for a process that was killed.
func TestEndSession(t *testing.T) {
	server := vspheretest.New(t)
	var sessions []*vsphere.Session
	for range 2 {
		s, err := vsphere.Connect(t.Context(), vsphere.Options{
			Server: server.Host, Port: server.Port, User: server.User, Password: secret.New(server.Password), Thumbprint: server.Thumbprint(),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		sessions = append(sessions, s)
	}
	key := sessions[0].Key()
	if key == "" || key == sessions[1].Key() || len(server.Sessions()) != 2 {
		t.Fatalf("keys %q and %q, sessions %v", key, sessions[1].Key(), server.Sessions())
	}
	for range 2 { // the second time, there is no such session any more
		if err := sessions[1].EndSession(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(server.Sessions()); n != 1 {
		t.Errorf("%d sessions, expected 1", n)
	}
}
