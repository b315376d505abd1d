package main

import (
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/vim25/soap"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// cookie logs in as somebody else and returns the cookie of the session.
func (v *vmTest) cookie() string {
	v.Helper()
	c, err := govmomi.NewClient(v.Context(), v.server.URL, true)
	if err != nil {
		v.Fatal(err)
	}
	u := url.URL{Scheme: "https", Host: v.server.URL.Host, Path: "/"}
	for _, cookie := range c.Client.Jar.Cookies(&u) {
		if cookie.Name == soap.SessionCookieName {
			return cookie.Value
		}
	}
	v.Fatal("the server has given no cookie")
	return ""
}

// connects returns how often VDDK has tried to log in.
func (v *vmTest) connects() int64 { return v.server.Library.Calls()["ConnectEx"] }

// refused returns how often VDDK's logins were refused.
func (v *vmTest) refused() (n int) {
	for _, line := range v.server.Library.Trace() {
		if strings.Contains(line, "refused login") {
			n++
		}
	}
	return n
}

// TestVMWrongPassword checks that a wrong password is tried once, and never by VDDK.
func TestVMWrongPassword(t *testing.T) {
	vmStates(t)
	v := newVM(t)
	r := v.exits(1, v.start(nil, []string{"VDDKCP_PASSWORD=wrong-Secret"}))
	v.says(r, "refused the login", "the user name or the password is wrong")
	if logins := v.server.Calls()["Login"]; logins != 1 || v.connects() != 0 {
		t.Errorf("%d logins, and %d of VDDK; want one", logins, v.connects())
	}
	if strings.Contains(r.stderr, "wrong-Secret") {
		t.Errorf("the password is in the output:\n%s", r.stderr)
	}
	v.left(0)
	then := v.now()
	v.copies()
	v.published(then)
	if v.connects() == 0 || v.refused() > 0 {
		t.Errorf("%d logins of VDDK, %d were refused", v.connects(), v.refused())
	}
}

// TestVMCookie checks that the session of a cookie is used and not ended, and that no other login is
// made.
func TestVMCookie(t *testing.T) {
	vmStates(t)
	v := newVM(t, vspheretest.Configure(func(o *vspheretest.Options) { o.StrictLogin = true }))
	then := v.now()
	cookie := v.cookie()
	r := v.exits(0, v.start(nil, []string{"VDDKCP_PASSWORD=", "VDDKCP_COOKIE=" + cookie}))
	if strings.Contains(r.stderr, cookie) {
		t.Errorf("the cookie is in the output:\n%s", r.stderr)
	}
	if calls := v.server.Calls(); calls["Login"] != 1 || calls["Logout"] != 0 || len(v.server.Sessions()) != 1 {
		t.Errorf("%d logins, %d logouts, %d sessions; want one login of the test and its session", calls["Login"], calls["Logout"], len(v.server.Sessions()))
	}
	v.server.EndSessions()
	v.published(then)
}

// TestVMCookieEnds ends the session of a cookie while a VM is copied. Without a password, no snapshot
// can be removed after that. Another cookie continues the copy.
func TestVMCookieEnds(t *testing.T) {
	vmStates(t)
	for _, password := range []bool{false, true} {
		t.Run(map[bool]string{false: "cookie", true: "cookie and password"}[password], func(t *testing.T) {
			v := newVM(t, vspheretest.Configure(func(o *vspheretest.Options) { o.StrictLogin = true }))
			then := v.now()
			env := []string{"VDDKCP_COOKIE=" + v.cookie()}
			if !password {
				env = append(env, "VDDKCP_PASSWORD=")
			}
			p := v.start([]string{"checkpoint:1"}, env, "--parallel", "1", "--request-size", "64KiB", "--rate-limit", "1MiB", "--report", "report.json")
			release := p.at("checkpoint:1")
			v.server.EndSessions()
			p.loseConnection()
			release()
			if password {
				v.exits(0, p)
				v.published(then)
				return
			}
			v.says(v.exits(75, p), "the session that the cookie names has ended", "pass the cookie of the new session")
			v.left(1)
			if !slices.Equal(v.report().Left, v.ours()) {
				t.Errorf("the report has %q, want %q", v.report().Left, v.ours())
			}
			v.write()
			v.exits(0, v.start(nil, []string{"VDDKCP_PASSWORD=", "VDDKCP_COOKIE=" + v.cookie()}, "--resume"))
			v.server.EndSessions()
			v.published(then)
		})
	}
}

// TestVMCookieIsRefused copies a VM from a server whose hosts refuse the session of the program to
// VDDK. Then VDDK logs in with the password, and tries each login once.
func TestVMCookieIsRefused(t *testing.T) {
	vmStates(t)
	for _, c := range []struct {
		name    string
		conf    []string
		env     []string
		exit    int
		refused int
		says    string
	}{
		{"password", []string{"user " + vspheretest.DefaultUser, "password " + vspheretest.DefaultPassword}, nil, 0, 1, ""},
		{"password refused too", []string{"user x", "password y"}, nil, 1, 2, "password"},
		{"no password", []string{"user x", "password y"}, []string{"VDDKCP_PASSWORD="}, 1, 1, "pass --user and --password"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVM(t)
			v.server.Library.Conf(append(c.conf, "cookie none", "trace")...)
			env := c.env
			if env != nil {
				env = append(env, "VDDKCP_COOKIE="+v.cookie())
			}
			then := v.now()
			r := v.exits(c.exit, v.start(nil, env, "--parallel", "1"))
			v.says(r, c.says)
			if n := v.refused(); n != c.refused {
				t.Errorf("%d logins of VDDK were refused, want %d\n%s", n, c.refused, r.stderr)
			}
			if env != nil {
				v.server.EndSessions()
			}
			v.left(0)
			if c.exit == 0 {
				v.published(then)
			}
		})
	}
}

// TestVMNames copies VMs with odd names, on datastores with odd names, to folders with odd names.
func TestVMNames(t *testing.T) {
	vmStates(t)
	for i, c := range []struct{ vm, datastore, folder, file string }{
		{"web/01", "ds/1", "a b", "web_01"},
		{"web%2f01", "ds%2f1", "a%2fb", "web%2f01"},
		{" web  01 ", "ds  1", " ", " web  01 "},
		{`it's "web"`, `the "old" one's`, `it's "here"`, `it's "web"`},
		{"web[01]", "ds(1)", "[x]", "web[01]"},
		{"[ds1] web01", "ds1", "images", "[ds1] web01"},
		{"größe-日本-ü", "Datenträger", "Größe", "größe-日本-ü"},
		{"web#1", "ds#1", "a#b", "web#1"},
		{"-web", "-ds", "x", "_web"},
		{"web*", "ds*", "x*", "web*"},
		{"moref", "uuid", "x", "moref"},
		{`a\b`, `c\d`, `e\f`, `a\b`},
		{"a:b", "c:d", "e:f", "a:b"},
		{"{vm}", "{n}", "x", "{vm}"},
	} {
		t.Run(strconv.Itoa(i), func(t *testing.T) { // the names of the folders of the test must not be odd, too
			v := newVMs(t, vspheretest.Datastore{Name: c.datastore}, vspheretest.VM{
				Name: c.vm, Datastore: c.datastore, Folder: "prod", Snapshots: []string{c.vm}, Disks: []vspheretest.Disk{{Size: vmDiskSize}, {Size: vmDiskSize}}})
			then := func() [][]byte {
				v.vm, v.others = c.vm, []string{c.vm}
				defer func() { v.vm = c.file }()
				return v.now()
			}()
			dst := filepath.Join(v.dir, c.folder) + "/"
			check := func() {
				t.Helper()
				for i, want := range then {
					got := read(t, filepath.Join(dst, v.vm+"-disk"+string(rune('1'+i))+".raw"))
					if !slices.Equal(got, want) {
						t.Errorf("disk %d differs from its copy", i+1)
					}
				}
				if names := v.server.SnapshotNames(c.vm); !slices.Equal(names, v.others) {
					t.Errorf("the snapshots are %q", names)
				}
				if err := os.RemoveAll(dst); err != nil {
					t.Fatal(err)
				}
			}
			path := "/DC0/vm/prod/" + strings.NewReplacer("%", "%25", "/", "%2f", `\`, "%5c").Replace(c.vm)
			for _, name := range []string{c.vm, path, "moref=" + v.server.Find(c.vm).Value} {
				v.exits(0, v.startCommand(nil, nil, "vm", "--", name, dst))
				check()
			}
			disk := filepath.Join(v.dir, "one.raw")
			v.exits(0, v.startCommand(nil, nil, "copy", "vm:"+strings.ReplaceAll(c.vm, "#", "%23")+"#2", disk))
			if !slices.Equal(read(t, disk), then[1]) {
				t.Error("the disk differs from its copy")
			}
		})
	}
}

// TestVMsOfOneName checks that a name which two VMs have is not enough.
func TestVMsOfOneName(t *testing.T) {
	vmStates(t)
	v := newVMs(t, vspheretest.VM{Name: "web01", Folder: "prod", Disks: []vspheretest.Disk{{}}}, vspheretest.VM{Name: "web01", Folder: "test", Disks: []vspheretest.Disk{{}}})
	r := v.exits(2, v.startCommand(nil, nil, "vm", "web01", v.images()))
	v.says(r, "/DC0/vm/prod/web01", "/DC0/vm/test/web01", v.server.Find("/DC0/vm/prod/web01").Value, v.server.Find("/DC0/vm/test/web01").Value)
	v.exits(0, v.startCommand(nil, nil, "vm", "/DC0/vm/test/web01", v.images()))
	if !slices.Equal(read(t, v.target(1)), read(t, v.server.Image("/DC0/vm/test/web01", 1))) {
		t.Error("the disk differs from its copy")
	}
	// The other VM of this name is not the one of the state file.
	for _, args := range [][]string{{"--resume"}, nil} {
		r := v.startCommand(nil, nil, append([]string{"vm", "/DC0/vm/prod/web01", v.images()}, args...)...).wait()
		if r.exit != 2 && r.exit != 1 {
			t.Errorf("exit status %d\n%s", r.exit, r.stderr)
		}
	}
	for _, path := range []string{"/DC0/vm/prod/web01", "/DC0/vm/test/web01"} {
		if names := v.server.SnapshotNames(path); len(names) > 0 {
			t.Errorf("%s has the snapshots %q", path, names)
		}
	}
}

// TestVMSecrets checks that no password and no cookie is in the command lines and environments of the
// processes, in the state file, the report, the journal and the log.
func TestVMSecrets(t *testing.T) {
	vmStates(t)
	v := newVM(t)
	p, _ := v.midway("-v", "--log-file", "log")
	var secrets []string
	secrets = append(secrets, v.server.Password)
	for _, pid := range children(t, p.cmd.Process.Pid) {
		for _, file := range []string{"environ", "cmdline"} {
			text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), file))
			if err != nil {
				t.Fatal(err)
			}
			for _, secret := range append(secrets, "VDDKCP_PASSWORD", "vmware_soap_session") {
				if strings.Contains(string(text), secret) {
					t.Errorf("%s of a worker has the secret %q", file, secret)
				}
			}
		}
	}
	p.kill()
	out, err := exec.Command("grep", "-rlF", v.server.Password, v.images(), filepath.Join(v.dir, "log"), filepath.Join(v.dir, "state")).CombinedOutput()
	if len(out) > 0 && !strings.Contains(string(out), "No such file") {
		t.Errorf("the password is in %s (%v)", out, err)
	}
}
