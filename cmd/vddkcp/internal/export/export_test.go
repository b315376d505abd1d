package export

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nbd/server"
)

func TestCheckListen(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, c := range []struct{ addresses, want string }{
		{"tcp://127.0.0.1:10809 unix:s unix:- unix:- systemd tcp://[::1]:0 tcp://[::1]:0 tcp://localhost:http", ""},
		{"", `"": invalid address: want tcp://HOST:PORT or unix:PATH (or "unix:-" for a private socket, or "systemd" for sockets from systemd)`},
		{"unix:", "has no path"},
		{"unix:/" + strings.Repeat("n", 107), "has 108 bytes, want at most 107"},
		{"unix:" + strings.Repeat("n", 107), "want at most 107"},
		{"unix:/" + strings.Repeat("n", 106), ""},
		{"unix:s unix:./s", "unix:./s is given twice"},
		{"systemd systemd", "given twice"},
		{"tcp://127.0.0.1:10809 tcp://127.0.0.1:010809", "given twice"},
		{"tcp://", "missing port"},
		{"tcp://127.0.0.1", "missing port in address"},
		{"tcp://127.0.0.1:", `port ""`},
		{"tcp://:10809", "has no host"},
		{"tcp://::1:10809", "too many colons"},
		{"tcp://[::1:10809", "missing ']'"},
		{"tcp://127.0.0.1:65536", `invalid port "65536", want 0 to 65535`},
		{"tcp://127.0.0.1:-1", `port "-1"`},
		{"tcp://127.0.0.1:x", `port "x"`},
		{"tcp://127.0.0.1:10809/name", `port "10809/name"`},
		{"tcp://user@127.0.0.1:1", "is not a host name"},
		{"127.0.0.1:10809", "want tcp://HOST:PORT"},
		{"/run/s", "want tcp://HOST:PORT"},
		{"10809", "want tcp://HOST:PORT"},
		{"udp://127.0.0.1:1", "want tcp://HOST:PORT"},
		{"nbd://127.0.0.1:1", "want tcp://HOST:PORT"},
		{"vsock:2:1", "want tcp://HOST:PORT"},
		{"TCP://127.0.0.1:1", "want tcp://HOST:PORT"},
	} {
		err := CheckListen(strings.Split(c.addresses, " "))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "--listen ")) {
			t.Errorf("%s: %v, want %q", c.addresses, err, c.want)
		}
	}
}

func TestMayName(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"*", "[ds] a/a.vmdk", true},
		{"*", "", false},
		{"[ds] *", "[ds] a/a.vmdk", true},
		{"[ds] *", "[other] a/a.vmdk", false},
		{"[ds] a/*", "[ds] a/b/a.vmdk", true},
		{"[ds] a/*", "[ds] b/a.vmdk", false},
		{"[ds] a/*", "[ds] a/../b/a.vmdk", false},
		{"*", "[ds] ../a.vmdk", false},
		{"*", "[ds] a..b/a.vmdk", true},
		{"[ds] a/?.vmdk", "[ds] a/é.vmdk", true},
		{"[ds] a/?.vmdk", "[ds] a/xy.vmdk", false},
		{"[ds] a/[a-c].vmdk", "[ds] a/b.vmdk", true},
		{"[ds] a/[a-c].vmdk", "[ds] a/d.vmdk", false},
		{"[ds] a/[!a-c].vmdk", "[ds] a/d.vmdk", true},
		{"[ds] a/[!a-c].vmdk", "[ds] a/b.vmdk", false},
		{"[ds] a/[]x].vmdk", "[ds] a/].vmdk", true},
		{"[ds] a/[x.vmdk", "[ds] a/[x.vmdk", true},
		{`\[ds\] *.vmdk`, "[ds] a.vmdk", true},
		{"[[]ds] *.vmdk", "[ds] a.vmdk", true},
		{"[ds] a.vmdk", "[ds] axvmdk", false},
		{"[ds] a.vmdk", "[ds] a.vmdk2", false},
		{"[ds] a+b(c)*", "[ds] a+b(c)d", true},
		{"/vms/*", "/vms/a.vmdk", true},
		{"/vms/*", "/etc/shadow", false},
		{`x\`, "x", true},
		{"[z-a]", "b", false},
	} {
		if got := mayName(c.pattern, c.name); got != c.want {
			t.Errorf("%s and %s: %v", c.pattern, c.name, got)
		}
	}
}

func TestPrintOperations(t *testing.T) {
	var b bytes.Buffer
	printOperations(&b, nil)
	if b.Len() > 0 {
		t.Errorf("%q of no requests", b.String())
	}
	printOperations(&b, []server.Operation{
		{Name: "read", Count: 3, Bytes: 9216, Time: 3 * time.Millisecond, Average: time.Millisecond, Sizes: []server.SizeClass{{UpTo: 4096, Count: 2}, {Count: 1}}},
		{Name: "write zeroes", Count: 1, Failed: 1},
	})
	want := `operation     count  failed  bytes  time  average  up to: count
read          3      0       9216   3ms   1ms      4.0KiB: 2, more: 1
write zeroes  1      1       0      0s    0s       
`
	if got := b.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
