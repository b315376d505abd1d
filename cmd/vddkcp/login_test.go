package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/transfer/batch"
)

// setConfig makes text the user's configuration file.
func setConfig(t *testing.T, text string) (path string) {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	path = filepath.Join(dir, "vddkcp", "config.json")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const testConfig = `{"servers": {
	"vc1": {"server": "vc1", "user": "u1", "password": "p1", "thumbprint": "1111111111111111111111111111111111111111", "port": 1001, "nfchostport": 1902, "libdir": "/l1"},
	"vc2": {"server": "VC2.", "password": "p2", "cookie": "c2"}}}`

// TestPrecedence checks which values are used, and that a password is never used for another server or
// user than its own.
func TestPrecedence(t *testing.T) {
	config := setConfig(t, testConfig)
	thumbprint, other := strings.Repeat("11", 20), strings.Repeat("22", 20)
	full := []string{"SERVER=h", "USER=eu", "THUMBPRINT=" + other, "PORT=2001", "NFCHOSTPORT=2902", "LIBDIR=/le"}
	for name, c := range map[string]struct {
		flags  string
		env    []string // without VDDKCP_
		secret string   // VDDKCP_PASSWORD|VDDKCP_COOKIE
		want   string   // server:port user password|cookie thumbprint nfchostport libdir
		err    string
		hint   string
	}{
		"a profile":              {flags: "--profile vc1", want: "vc1:1001 u1 p1| " + thumbprint + " 1902 /l1"},
		"by the variable":        {env: []string{"PROFILE=vc1"}, want: "vc1:1001 u1 p1| " + thumbprint + " 1902 /l1"},
		"flag before variable":   {flags: "--profile vc1", env: []string{"PROFILE=vc2"}, want: "vc1:1001 u1 p1| " + thumbprint + " 1902 /l1"},
		"no profile after all":   {flags: "--profile= --server vc1 --user u1", env: []string{"PROFILE=vc1"}, secret: "e|", want: "vc1:0 u1 e|  0 "},
		"flags before profile":   {flags: "--profile vc1 --user u --password p --thumbprint " + other + " --port 3 --nfchostport 4 --libdir /l", want: "vc1:3 u p| " + other + " 4 /l"},
		"variables of no server": {flags: "--profile vc1", env: full[2:], secret: "e|f", want: "vc1:2001 u1 e|f " + other + " 2902 /le"},
		"variables":              {env: full, secret: "e|f", want: "h:2001 eu e|f " + other + " 2902 /le"},
		"flags before variables": {flags: "--server h --user u --password p --cookie c --thumbprint " + thumbprint + " --port 3 --nfchostport 4 --libdir /l", env: full, secret: "e|f", want: "h:3 u p|c " + thumbprint + " 4 /l"},
		"the same server":        {flags: "--server VC1", env: []string{"PROFILE=vc1"}, want: "VC1:1001 u1 p1| " + thumbprint + " 1902 /l1"},
		"an equal name":          {flags: "--server vc2 --user u --profile vc2", want: "vc2:0 u p2|c2  0 "},
		"an empty server":        {flags: "--server= --profile vc1", err: "missing: --server"},

		// Another server.
		"variables of another server": {flags: "--server g --user u --password p", env: full, secret: "e|f", want: "g:0 u p|  0 /le"},
		"no login left":               {flags: "--server g", env: full, secret: "e|f", err: "missing: --user, --password or --cookie", hint: "VDDKCP_SERVER names another server, h"},
		"profile and flag":            {flags: "--profile vc1 --server g", err: "--profile: the profile vc1 in " + config + " is for the server vc1, but --server names the server g", hint: "leave out --profile or --server"},
		"profile and variable":        {flags: "--profile vc1", env: full, err: "but VDDKCP_SERVER names the server h", hint: "leave out --profile or VDDKCP_SERVER"},
		"two variables":               {env: append(full, "PROFILE=vc1"), err: "VDDKCP_PROFILE: the profile vc1", hint: "leave out VDDKCP_PROFILE or VDDKCP_SERVER"},
		"variable and flag":           {flags: "--server g --user u --password p", env: []string{"PROFILE=vc1"}, want: "g:0 u p|  0 "},
		"the profile does not count":  {flags: "--server g --user u", env: []string{"PROFILE=vc1"}, err: "missing: --password or --cookie", hint: "the profile vc1 of VDDKCP_PROFILE is not used, because it is for another server, vc1"},
		"profile of the flag's":       {flags: "--server vc1", env: append(full, "PROFILE=vc1"), secret: "e|f", want: "vc1:1001 u1 p1| " + thumbprint + " 1902 /le"},

		// Another user.
		"a user of the flag":       {flags: "--profile vc1 --user u", err: "missing: --password or --cookie", hint: "the password of the profile vc1 is not used, because it belongs to another user, u1"},
		"a user of the variable":   {flags: "--profile vc1", env: []string{"USER=eu"}, err: "missing: --password or --cookie", hint: "another user, u1"},
		"the same user":            {flags: "--profile vc1 --user U1", want: "vc1:1001 U1 p1| " + thumbprint + " 1902 /l1"},
		"any user":                 {flags: "--profile vc2 --user u", want: "VC2.:0 u p2|c2  0 "},
		"the password of another":  {flags: "--user u", env: full, secret: "e|", err: "missing: --password or --cookie", hint: "VDDKCP_PASSWORD is not used, because it belongs to another user, eu"},
		"password before a cookie": {flags: "--profile vc2 --user u --password p", want: "VC2.:0 u p|  0 "},
		"variable before a cookie": {flags: "--profile vc2 --user u", secret: "e|", want: "VC2.:0 u e|  0 "},

		// Mistakes.
		"no such profile":         {flags: "--profile vc3", err: "--profile: there is no profile vc3; did you mean vc1?", hint: "the profiles are: vc1, vc2"},
		"no such profile in env":  {env: []string{"PROFILE=x"}, err: "VDDKCP_PROFILE: there is no profile x", hint: "the profiles are: vc1, vc2"},
		"a wrong server":          {env: []string{"SERVER=h:1", "USER=u"}, secret: "e|", err: `VDDKCP_SERVER: "h:1": expected only`},
		"a wrong thumbprint":      {env: []string{"SERVER=h", "USER=u", "THUMBPRINT=x"}, secret: "e|", err: `VDDKCP_THUMBPRINT: "x" is not a thumbprint`},
		"a wrong flag":            {flags: "--server h:1", env: full, secret: "e|", err: "missing"},
		"a wrong server of flags": {flags: "--server h:1 --user u", secret: "e|", err: `--server: "h:1"`},
	} {
		t.Run(name, func(t *testing.T) {
			for _, v := range c.env {
				key, value, _ := strings.Cut(v, "=")
				t.Setenv("VDDKCP_"+key, value)
			}
			variables := new(secretEnvironment)
			if password, cookie, _ := strings.Cut(c.secret, "|"); password != "" {
				variables.password = secret.New(password)
				if cookie != "" {
					variables.cookie = secret.New(cookie)
				}
			}
			args := append([]string{"[ds] a.vmdk", "out", "--vm", "moref=1"}, strings.Fields(c.flags)...)
			p, _, err := paramsOf(t, variables, args...)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(hinted.Of(err), c.hint) {
					t.Fatalf("%v (%s), want %s (%s)", err, hinted.Of(err), c.err, c.hint)
				}
				return
			}
			if err != nil {
				t.Fatal(err, hinted.Of(err))
			}
			got := strings.Join([]string{p.Server + ":" + decimal(p.Port), p.User, p.Password.Reveal() + "|" + p.Cookie.Reveal(), p.Thumbprint, decimal(p.NFCHostPort), p.LibDir}, " ")
			if got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			command, err := parsed(variables, args...)
			if err != nil {
				t.Fatal(err)
			}
			o, err := command.connection(t.Context(), func(string) {})
			if err != nil || o.Server != p.Server || o.Port != p.Port || o.User != p.User || o.Password != p.Password || o.Cookie != p.Cookie || o.Thumbprint != p.Thumbprint {
				t.Errorf("%v, %+v: want the same connection as for a disk", err, o)
			}
		})
	}
}

// TestLocalDisksStayLocal checks that only the command line makes a disk of VDDK a remote one.
func TestLocalDisksStayLocal(t *testing.T) {
	setConfig(t, testConfig)
	for _, v := range []string{"SERVER=vc1", "USER=u", "THUMBPRINT=x", "PORT=1", "NFCHOSTPORT=2", "LIBDIR=/le", "PROFILE=vc1"} {
		key, value, _ := strings.Cut(v, "=")
		t.Setenv("VDDKCP_"+key, value)
	}
	variables := &secretEnvironment{password: secret.New("e"), cookie: secret.New("f")}
	p, warnings, err := paramsOf(t, variables, "vddk:/a.vmdk", "out")
	if err != nil || p.Remote() || p.User != "" || p.Password.IsSet() || p.Cookie.IsSet() || p.Thumbprint != "" || p.Port != 0 || p.NFCHostPort != 0 || p.LibDir != "/le" || len(warnings) != 0 {
		t.Errorf("%+v, %v, %q", p, err, warnings)
	}
	if p, _, err := paramsOf(t, variables, "vddk:/a.vmdk", "out", "--server=", "--vm=", "--snapshot=", "--user=", "--profile=", "--thumbprint="); err != nil || p.Remote() {
		t.Errorf("%+v, %v: want flags without a value to count as not given", p, err)
	}
	for _, flag := range []string{"--server=vc1", "--user=u", "--vm=moref=1", "--snapshot=s", "--thumbprint=" + strings.Repeat("1", 40), "--port=5", "--nfchostport=5", "--profile=vc1"} {
		t.Setenv("VDDKCP_THUMBPRINT", strings.Repeat("1", 40))
		args := []string{"vddk:/a.vmdk", "out", flag}
		p, _, err := paramsOf(t, variables, args...)
		if !strings.HasPrefix(flag, "--vm") {
			if err == nil || err.Error() != "missing: --vm" {
				t.Errorf("%s: %v, want a disk on a server", flag, err)
			}
		} else if err != nil || p.Server != "vc1" || p.Password.Reveal() != "e" {
			t.Errorf("%s: %+v, %v", flag, p, err)
		}
	}
}

// The configuration file is read only if a disk on a server and a profile are used.
func TestConfigurationIsReadWhenNeeded(t *testing.T) {
	setConfig(t, "{")
	for name, c := range map[string]struct {
		args []string
		err  bool
	}{
		"no profile":   {[]string{"[ds] a", "out", "--server", "h", "--user", "u", "--password", "p", "--vm", "moref=1"}, false},
		"a local disk": {[]string{"vddk:/a", "out"}, false},
		"a profile":    {[]string{"[ds] a", "out", "--vm", "moref=1", "--profile", "a"}, true},
	} {
		if _, _, err := paramsOf(t, nil, c.args...); (err != nil) != c.err {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestConcurrentParams opens several disks at once, as a server of exports does.
func TestConcurrentParams(t *testing.T) {
	setConfig(t, testConfig)
	c, err := parsed(new(secretEnvironment), "[ds] a", "out", "--profile", "vc1", "--vm", "moref=1", "--transports", "odd")
	if err != nil {
		t.Fatal(err)
	}
	o := c.opener()
	var mu sync.Mutex
	warnings := 0
	o.VDDK.Options.Warn = func(string) {
		mu.Lock()
		defer mu.Unlock()
		warnings++
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if p, err := o.VDDK.Params(t.Context(), "[ds] a"); err != nil || p.Password.Reveal() != "p1" {
				t.Errorf("%+v, %v", p, err)
			}
			c.provenance()
		})
	}
	group.Wait()
	if warnings != 1 {
		t.Errorf("%d warnings, want 1", warnings)
	}
}

func TestProvenance(t *testing.T) {
	config := setConfig(t, testConfig)
	t.Setenv("VDDKCP_LIBDIR", "/le")
	t.Setenv("VDDKCP_PORT", "77")
	c, err := parsed(&secretEnvironment{cookie: secret.New("s3cret")}, "[ds] a", "out", "--profile", "vc1", "--vm", "moref=1", "--user", "u1")
	if err != nil {
		t.Fatal(err)
	}
	if lines := c.provenance(); len(lines) != 0 {
		t.Errorf("%q: want nothing before the values are used", lines)
	}
	if _, err := c.opener().VDDK.Params(t.Context(), "[ds] a"); err != nil {
		t.Fatal(err)
	}
	of := " (profile vc1 in " + config + ")"
	want := []string{
		"profile vc1 (--profile)", "server vc1" + of, "port 77 (VDDKCP_PORT)", "user u1 (--user)", "password" + of, "cookie (VDDKCP_COOKIE)",
		"thumbprint " + strings.Repeat("1", 40) + of, "nfchostport 1902" + of, "libdir /le (VDDKCP_LIBDIR)",
	}
	if got := c.provenance(); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestCleanEnvironment(t *testing.T) {
	t.Setenv("VDDKCP_SERVER", "")
	t.Setenv("VDDKCP_PORT", "tcp://10.0.0.1:10809")
	t.Setenv("VDDKCP_USER", "u")
	cleanEnvironment()
	for name, want := range map[string]bool{"VDDKCP_SERVER": false, "VDDKCP_PORT": false, "VDDKCP_USER": true} {
		if _, ok := os.LookupEnv(name); ok != want {
			t.Errorf("%s is set: %v, want %v", name, ok, want)
		}
	}
}

// TestServersOfJobs checks the server of a job, which decides which limits apply to the job, and its
// fingerprint.
func TestServersOfJobs(t *testing.T) {
	setConfig(t, testConfig)
	load := func(source, fields string) (*batch.Job, *copyCommand) {
		t.Helper()
		p, spec := jobSpec(t)
		text := fmt.Sprintf(`{"version": 1, "jobs": [{"source": %q, "target": "null:", "vm": "moref=1"%s}]}`, source, fields)
		f, err := batch.Load(strings.NewReader(text), "f", "/d", spec)
		if err != nil {
			t.Fatal(err)
		}
		c, err := p.command(f.Jobs[0])
		if err != nil {
			t.Fatal(err)
		}
		return f.Jobs[0], c
	}
	direct, _ := load("[ds] a", `, "server": "vc1", "user": "u1", "verify": true`)
	named, c := load("[ds] a", `, "profile": "vc1", "verify": true`)
	if named.Server() != "vc1" || named.HostKey() != direct.HostKey() || named.Fingerprint() != direct.Fingerprint() {
		t.Errorf("server %q, host key %q: want those of a job with the field server", named.Server(), named.HostKey())
	}
	if r, err := c.resolve(); err != nil || r.user != "u1" || !strings.HasPrefix(c.provenance()[1], "server vc1 (profile vc1 in ") {
		t.Errorf("%+v, %v, %q", r, err, c.provenance())
	}
	t.Setenv("VDDKCP_SERVER", "vc9")
	for _, job := range []struct{ source, fields, server, provenance string }{
		{"[ds] a", "", "vc9", "server vc9 (VDDKCP_SERVER)"},
		{"[ds] a", `, "server": "vc1"`, "vc1", "server vc1 (the field server of the job)"},
		{"/a", "", "", ""},
		{"/a", `, "server": "vc1"`, "vc1", "server vc1 (the field server of the job)"},
	} {
		j, c := load(job.source, job.fields)
		if job.provenance != "" {
			if _, err := c.resolve(); err != nil {
				t.Error(err)
			}
		}
		if j.Server() != job.server || !strings.HasPrefix(strings.Join(c.provenance(), "\n"), job.provenance) {
			t.Errorf("%+v: server %q, %q", job, j.Server(), c.provenance())
		}
	}
}

func decimal(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
