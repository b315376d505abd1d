package server_test

import (
	"context"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
	nbdclient "github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// TestOwnClient runs the suite for disks on an export that is read with this project's client.
func TestOwnClient(t *testing.T) {
	path, want := sparseFile(t, 1<<20+777)
	for name, d := range map[string]source.Disk{"file": openRaw(t, path), "memory": &sourcetest.Memory{Bytes: want}} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, one("disk", d), server.Options{}, "unix:"+socketPath(t))
			uri := server.URI(s.Addr(), false, "disk")
			sourcetest.Run(t, sourcetest.Config{Content: want, Open: func(ctx context.Context, t testing.TB) source.Disk {
				d, err := nbdclient.Open(ctx, parseURI(t, uri), nbdclient.Options{})
				if err != nil {
					t.Fatal(err)
				}
				return d
			}})
		})
	}
}

func parseURI(t testing.TB, s string) *nbd.URI {
	t.Helper()
	uri, err := nbd.ParseURI(s)
	if err != nil {
		t.Fatal(err)
	}
	return uri
}
