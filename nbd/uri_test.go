package nbd_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
)

func TestParseURI(t *testing.T) {
	for _, c := range []struct {
		uri  string
		want nbd.URI // without the text
		err  string  // a part of the error; "": there is none
	}{
		{uri: "nbd://localhost", want: nbd.URI{Host: "localhost", Port: "10809"}},
		{uri: "nbd://localhost:10810/", want: nbd.URI{Host: "localhost", Port: "10810"}},
		{uri: "NBD://[::1]:1/a%20b/c", want: nbd.URI{Host: "::1", Port: "1", Export: "a b/c"}},
		{uri: "nbd://h//x", want: nbd.URI{Host: "h", Port: "10809", Export: "/x"}},
		{uri: "nbd+unix:///?socket=/run/s", want: nbd.URI{Socket: "/run/s"}},
		{uri: "nbd+unix:///disk?socket=a%20b", want: nbd.URI{Socket: "a b", Export: "disk"}},
		{uri: "nbd+unix:///?socket=%00abstract", want: nbd.URI{Socket: "\x00abstract"}},
		{uri: "nbds://h?tls-certificates=/pki&tls-verify-peer=0", want: nbd.URI{TLS: true, Host: "h", Port: "10809", Certificates: "/pki", NoVerify: true}},
		{uri: "nbds+unix:///?socket=s&tls-hostname=esx", want: nbd.URI{TLS: true, Socket: "s", Hostname: "esx"}},

		{uri: "nbd:localhost", err: "not an NBD URI"},
		{uri: "http://h", err: "not an NBD URI"},
		{uri: "nbd://", err: "no host"},
		{uri: "nbd://h:0", err: "port"},
		{uri: "nbd://h:99999", err: "port"},
		{uri: "nbd://h:x", err: "port"},
		{uri: "nbd+vsock://2", err: "vsock is not supported"},
		{uri: "nbd+unix:///", err: "without a socket"},
		{uri: "nbd+unix://h/?socket=s", err: `host "h"`},
		{uri: "nbd://h?socket=s", err: "needs a Unix domain socket"},
		{uri: "nbd+unix:///?socket=s&socket=t", err: "2 times"},
		{uri: "nbd://h?color=red", err: `unknown parameter "color"`},
		{uri: "nbd://h?tls-certificates=/pki", err: "needs TLS"},
		{uri: "nbds://h?tls-psk-file=f", err: "pre-shared keys is not supported"},
		{uri: "nbds://alice@h", err: `user "alice"`},
		{uri: "nbds://h?tls-verify-peer=maybe", err: "want 0 or 1"},
		{uri: "nbd://h/x#y", err: `fragment "y"`},
		{uri: "nbd://h/%00", err: "without NUL"},
		{uri: "nbd://h/%ff", err: "want UTF-8"},
		{uri: "nbd://h/" + strings.Repeat("x", 4097), err: "4097 bytes"},
		{uri: "nbd://h/%zz", err: "%zz"},
	} {
		u, err := nbd.ParseURI(c.uri)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", c.uri, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.uri, err)
			continue
		}
		if u.String() != c.uri {
			t.Errorf("%s became %s", c.uri, u)
		}
		got := nbd.URI{TLS: u.TLS, Socket: u.Socket, Host: u.Host, Port: u.Port, Export: u.Export, Certificates: u.Certificates, Hostname: u.Hostname, NoVerify: u.NoVerify}
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.uri, got, c.want)
		}
	}
}

var writeSeeds = flag.Bool("write-seeds", false, "write the seeds of the fuzz targets into testdata")

func FuzzURI(f *testing.F) {
	for i, s := range []string{
		"nbd://localhost", "nbd://[::1]:10810/export", "nbds://h/?tls-certificates=%2Fpki", "nbd+unix:///?socket=/s",
		"nbds+unix:///a%20b?socket=s&tls-verify-peer=1", "nbd+vsock://2", "nbd://h/%00", "nbd://h?x=y", "nbd://u:p@h", "nbd://h:999999", "NBD+UNIX:///x?socket=%00",
	} {
		f.Add(s)
		if *writeSeeds {
			dir := filepath.Join("testdata", "fuzz", f.Name())
			err := os.MkdirAll(dir, 0o777)
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("seed-%02d", i)), fmt.Appendf(nil, "go test fuzz v1\nstring(%q)\n", s), 0o666)
			}
			if err != nil {
				f.Fatal(err)
			}
		}
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := nbd.ParseURI(s)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\x1b\x00\n") {
				t.Errorf("%q: the error %q could steer a terminal", s, err)
			}
			return
		}
		if !nbd.IsURI(s) || (u.Socket == "") == (u.Host == "") || len(u.Export) > nbd.MaxString || !u.TLS && (u.Certificates != "" || u.NoVerify) {
			t.Errorf("%q: %+v", s, u)
		}
	})
}
