package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vddk"
)

// parsed returns the flags of the command line of a copy.
func parsed(environment *secretEnvironment, args ...string) (*copyCommand, error) {
	c := new(cli)
	parser, err := newParser(c, io.Discard, io.Discard, func(int) {}, kong.Bind(environment, new(servers)))
	if err != nil {
		return nil, err
	}
	if args, err = rewriteWords(parser.Model, args); err != nil {
		return nil, err
	}
	_, err = parser.Parse(args)
	return &c.Copy, err
}

// paramsOf returns the parameters of the source in the command line of a copy.
func paramsOf(t *testing.T, environment *secretEnvironment, args ...string) (p vddk.Params, warnings []string, err error) {
	t.Helper()
	c, err := parsed(environment, args...)
	if err != nil {
		return p, nil, err
	}
	o := c.opener()
	o.VDDK.Options.Warn = func(s string) { warnings = append(warnings, s) }
	p, err = o.VDDK.Params(t.Context(), strings.TrimPrefix(c.Src, "vddk:"))
	return p, warnings, err
}

func TestVDDKFlags(t *testing.T) {
	want := vddk.Params{
		File: "[ds] a/a.vmdk", Server: "esxi", User: `DOMAIN\root`, Password: vddk.NewSecret("pw"), VM: "moref=vm-1", Snapshot: "snapshot-2",
		Thumbprint: strings.Repeat("ab", 20), Port: 444, NFCHostPort: 903, Transports: "nbdssl:nbd", Compression: "skipz",
		Config: "/etc/c", LibDir: "/opt/v", SingleLink: true, Unbuffered: true,
	}
	asWords := []string{
		"server=esxi", `user=DOMAIN\root`, "password=pw", "vm=moref=vm-1", "snapshot=snapshot-2", "thumbprint=" + want.Thumbprint, "port=444",
		"nfchostport=903", "transports=nbdssl:nbd", "compression=skipz", "config=/etc/c", "libdir=/opt/v", "single-link=true", "unbuffered=1", "file=[ds] a/a.vmdk", "out",
	}
	got, _, err := paramsOf(t, nil, asWords...)
	if err != nil || got != want {
		t.Errorf("words: %v\ngot  %+v\nwant %+v", err, got, want)
	}
	var asFlags []string
	for _, w := range asWords {
		switch {
		case strings.HasPrefix(w, "file="):
			asFlags = append(asFlags, want.File)
		case keyValue.MatchString(w):
			asFlags = append(asFlags, "--"+w)
		default:
			asFlags = append(asFlags, w)
		}
	}
	want.NFCBuffers, want.PrepareAccess = vddk.NFCBuffers{Size: 2 << 20, Count: 3}, true
	asFlags = append(asFlags, "--nfc-buffers", "2MiBx3", "--prepare-access")
	got, warnings, err := paramsOf(t, nil, asFlags...)
	if err != nil || got != want {
		t.Errorf("flags: %v\ngot  %+v\nwant %+v", err, got, want)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "can see a --password on the command line") {
		t.Errorf("warnings %q", warnings)
	}

	c, err := parsed(nil, "a", "b", "-D", "vddk.stats=1", "-Dvddk.datapath=0", "--retries", "3", "--retry-timeout", "1m", "--timeout", "5s")
	if err != nil {
		t.Fatal(err)
	}
	o := c.opener()
	if got := fmt.Sprint(o.VDDK.Options.Debug, o.VDDK.Options.Timeout, o.NBD.Timeout, o.Retry.Retries, o.Retry.Timeout); got != "map[datapath:false stats:true] 5s 5s 3 1m0s" {
		t.Error(got)
	}
	if p, _, err := paramsOf(t, nil, "server=[::1]", "user=u", "password=+/dev/null", "vm=moref=1", "/x", "out"); err != nil || p.Server != "::1" {
		t.Errorf("%q, %v: want an address without brackets", p.Server, err)
	}
	if c, err = parsed(nil, "a", "b"); err != nil || c.opener().Retry.Retries != -1 {
		t.Errorf("without --retries: %v, want no limit", err)
	}
}

func TestVDDKFlagsRefused(t *testing.T) {
	for flags, want := range map[string]string{
		"--port 0":                       "--port: \"0\": want a port",
		"--port 65536":                   "want a port number from 1 to 65535",
		"--nfchostport x":                "--nfchostport: ",
		"--compression lz4":              "--compression must be one of",
		"--nfc-buffers 1MiB":             "want SIZExCOUNT",
		"--nfc-buffers 1MiBxy":           "is not a number",
		"--nfc-buffers 1x1":              "--nfc-buffers",
		"-D vddk.other=1":                "where KEY is one of diskinfo, extents, datapath, stats",
		"-D nbdkit.log=1":                "want vddk.KEY=0|1",
		"-D vddk.stats=2":                "want 0 or 1",
		"-D vddk.stats":                  "want 0 or 1",
		"--retries -1":                   "--retries",
		"--retries=-1":                   "want a number of retries, or unlimited",
		"--retries many":                 "want a number of retries, or unlimited",
		"--retry-timeout 0s":             "want a duration",
		"--timeout 5":                    "want a duration",
		"--timeout=-5s":                  "want a duration",
		"--thumbprint abc":               "--thumbprint: \"abc\" is not a thumbprint",
		"--server esxi:443":              "--server: \"esxi:443\"",
		"--vm vm-1":                      "expected moref=ID",
		"--password -1":                  "file descriptors 0 to 2",
		"--password -hunter2":            "no number of a file descriptor",
		"--password=-hunter2":            "no number of a file descriptor",
		"--password -99999999999999":     "no number of a file descriptor",
		"--password -123":                "file descriptor 123: bad file descriptor",
		"--password +":                   "the path of a file",
		"--password +/nowhere/hunter":    "no such file",
		"--cookie +/":                    "is a directory",
		"--password":                     "--password",
		"--password hunter2 --server a/": "--server",
	} {
		t.Run(flags, func(t *testing.T) {
			args := []string{"--server", "esxi", "--user", "root", "--password", "hunter2", "--vm", "moref=1", "[ds] a.vmdk", "out"}
			_, _, err := paramsOf(t, nil, append(args, strings.Fields(flags)...)...)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Fatalf("%v, want %q", err, want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%v: tells the password", err)
			}
			var wrong *usage.Error
			var params *vddk.ParamsError
			var parse *kong.ParseError
			if !errors.As(err, &wrong) && !errors.As(err, &params) && !errors.As(err, &parse) {
				t.Errorf("%T is no usage error", err)
			}
		})
	}
}

func TestPasswordForms(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var printable strings.Builder
	for c := byte(' '); c < 0x7f; c++ {
		printable.WriteByte(c)
	}
	all := printable.String()[1:] // "!" first: not one of the forms
	pipe := func(text string) string {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, text)
		w.Close()
		// The flag's own number: what reads it closes it.
		fd := int(r.Fd())
		t.Cleanup(func() { r.Close() })
		return fmt.Sprintf("-%d", fd)
	}
	environment := &secretEnvironment{password: vddk.NewSecret("from env"), cookie: vddk.NewSecret("cookie env")}
	for name, c := range map[string]struct {
		args        []string
		environment *secretEnvironment
		want        string // password|cookie, - for none
	}{
		"plain":             {args: []string{"--password", "x"}, want: "x|-"},
		"plain with =":      {args: []string{"--password=a=b c"}, want: "a=b c|-"},
		"all characters":    {args: []string{"--password", all}, want: all + "|-"},
		"a word":            {args: []string{"password=" + all}, want: all + "|-"},
		"empty":             {args: []string{"--password="}, want: "|-"},
		"an empty word":     {args: []string{"password="}, want: "|-"},
		"a file":            {args: []string{"--password", "+" + file("a", "first line\nsecond")}, want: "first line|-"},
		"a file, CR LF":     {args: []string{"password=+" + file("b", "dos\r\n")}, want: "dos|-"},
		"a file, no end":    {args: []string{"--password", "+" + file("c", " - spaces ")}, want: " - spaces |-"},
		"an empty file":     {args: []string{"--password", "+" + file("d", "")}, want: "|-"},
		"a cookie":          {args: []string{"--cookie", "+" + file("e", "kkk\n")}, want: "-|kkk"},
		"both":              {args: []string{"--cookie", "k", "--password", "p"}, want: "p|k"},
		"a descriptor":      {args: []string{"--password", pipe("piped\nmore")}, want: "piped|-"},
		"a descriptor, =":   {args: []string{"--password=" + pipe("piped")}, want: "piped|-"},
		"a descriptor word": {args: []string{"password=" + pipe("-\n")}, want: "-|-"},
		"environment":       {environment: environment, want: "from env|cookie env"},
		"flag before it":    {environment: environment, args: []string{"--password", "p"}, want: "p|cookie env"},
		"empty before it":   {environment: environment, args: []string{"--password", ""}, want: "|cookie env"},
	} {
		t.Run(name, func(t *testing.T) {
			p, _, err := paramsOf(t, c.environment, append([]string{"[ds] a.vmdk", "out", "server=h", "user=u", "vm=moref=1"}, c.args...)...)
			if err != nil {
				t.Fatal(err)
			}
			show := func(s vddk.Secret) string {
				if !s.IsSet() {
					return "-"
				}
				return s.Reveal()
			}
			if got := show(p.Password) + "|" + show(p.Cookie); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestTooLongSecretIsRefused(t *testing.T) {
	if _, err := firstLine(strings.NewReader(strings.Repeat("x", maxSecret+1) + "\n")); err == nil {
		t.Error("no error")
	}
	if s, err := firstLine(strings.NewReader(strings.Repeat("x", maxSecret-1) + "\n")); err != nil || len(s) != maxSecret-1 {
		t.Errorf("%d bytes, %v", len(s), err)
	}
}

// TestSecretsAreReadOnceAndLast checks that vddkcp asks for a password only if all
// other parameters of the source are valid, and does not ask again for a second disk.
func TestSecretsAreReadOnceAndLast(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(path, []byte("first\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := parsed(nil, "[ds] a.vmdk", "out", "--server", "h", "--user", "u", "--vm", "moref=1", "--password", "+"+path)
	if err != nil {
		t.Fatal(err)
	}
	params := c.opener().VDDK.Params
	if _, err := params(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "missing: the disk") {
		t.Fatal(err)
	}
	if p, err := params(context.Background(), "[ds] a.vmdk"); err != nil || p.Password.Reveal() != "first" {
		t.Fatalf("%+v, %v", p, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if p, err := c.opener().VDDK.Params(t.Context(), "[ds] b.vmdk"); err != nil || p.Password.Reveal() != "first" || p.File != "[ds] b.vmdk" {
		t.Errorf("%+v, %v: want what was read before", p, err)
	}
}

func TestExtractSecrets(t *testing.T) {
	t.Setenv("VDDKCP_PASSWORD", "-3")
	t.Setenv("VDDKCP_COOKIE", "")
	s := extractSecrets()
	if s.password.Reveal() != "-3" || s.cookie.IsSet() {
		t.Errorf("%q, %v: want the password as it is, and no cookie", s.password.Reveal(), s.cookie.IsSet())
	}
	for _, name := range []string{"VDDKCP_PASSWORD", "VDDKCP_COOKIE"} {
		if _, ok := os.LookupEnv(name); ok {
			t.Errorf("%s is still there, for each child", name)
		}
	}
}
