package profile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// write writes a configuration file and returns its path.
func write(t *testing.T, name, text string, perm os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, perm); err != nil {
		t.Fatal(err)
	}
	return path
}

const thumbprint = "ABABABABABABABABABABABABABABABABABABABAB"

func TestFind(t *testing.T) {
	user := write(t, "user.json", `{"servers": {
		"all": {"server": "vc.example.com", "user": "u", "password": "+secrets/pw", "cookie": "+/c", "thumbprint": "`+thumbprint+`",
			"port": 8443, "nfchostport": 903, "libdir": "vddk", "via": "nfc"},
		"both": {"server": "of-user"}, "plain": {"server": "[::1]", "password": "p4ss", "cookie": "c00kie"}}}`, 0o600)
	system := write(t, "system.json", `{"servers": {"both": {"server": "of-system", "user": "u"}, "only": {"server": "s"}}}`, 0o644)
	config := New(user, system)
	all, err := config.Find("all")
	dir := filepath.Dir(user)
	if err != nil || all.Server != "vc.example.com" || all.User != "u" || all.Thumbprint != thumbprint || all.Port != 8443 || all.NFCHostPort != 903 || all.Via != "nfc" {
		t.Errorf("%+v, %v", all, err)
	}
	if all.Password != (Secret{File: dir + "/secrets/pw"}) || all.Cookie != (Secret{File: "/c"}) || all.LibDir != dir+"/vddk" || all.File != user || all.Name != "all" {
		t.Errorf("%+v", all)
	}
	if plain, err := config.Find("plain"); err != nil || plain.Password.Text.Reveal() != "p4ss" || plain.Cookie.Text.Reveal() != "c00kie" {
		t.Errorf("%+v, %v", plain, err)
	}
	if both, err := config.Find("both"); err != nil || both.Server != "of-user" || both.User != "" || both.File != user {
		t.Errorf("%+v, %v: want the profile of the user, and nothing of the other", both, err)
	}
	if only, err := config.Find("only"); err != nil || only.Server != "s" || only.File != system {
		t.Errorf("%+v, %v", only, err)
	}
	profiles, err := config.List()
	var names []string
	for _, p := range profiles {
		names = append(names, p.Name+" "+p.Server)
	}
	if got := strings.Join(names, ", "); err != nil || got != "all vc.example.com, both of-user, only s, plain [::1]" {
		t.Errorf("%s, %v", got, err)
	}
	for name, c := range map[string]struct{ want, hint string }{
		"al":    {"there is no profile al; did you mean all?", "the profiles are: all, both, only, plain"},
		"other": {"there is no profile other", "the profiles are: all, both, only, plain"},
		"":      {`"" cannot be the name of a profile`, ""},
		"a/b":   {`"a/b" cannot be the name`, ""},
	} {
		_, err := config.Find(name)
		var wrong *usage.Error
		if err == nil || !strings.Contains(err.Error(), c.want) || hinted.Of(err) != c.hint || !errors.As(err, &wrong) {
			t.Errorf("%s: %v (%s), want %s (%s)", name, err, hinted.Of(err), c.want, c.hint)
		}
	}
}

// The file of the machine is read only if the profile is not in that of the user.
func TestFilesAreReadWhenNeeded(t *testing.T) {
	good := write(t, "user.json", `{"servers": {"a": {"server": "s"}}}`, 0o600)
	bad := write(t, "system.json", `{"servers": `, 0o600)
	if _, err := New(good, bad).Find("a"); err != nil {
		t.Error(err)
	}
	if _, err := New(good, bad).Find("b"); err == nil || !strings.Contains(err.Error(), bad) {
		t.Errorf("%v, want an error of %s", err, bad)
	}
	if _, err := New(bad, good).Find("a"); err == nil || !strings.Contains(err.Error(), bad) {
		t.Errorf("%v, want an error of %s", err, bad)
	}
	if all, err := New(good, bad).List(); len(all) != 1 || err == nil {
		t.Errorf("%d profiles, %v: want one, and an error", len(all), err)
	}
	if _, err := New("", "").Find("a"); err == nil {
		t.Error("a profile without files was found")
	}
	none := filepath.Join(t.TempDir(), "none")
	if _, err := New(none, filepath.Join(good, "below a file")).Find("a"); err == nil || hinted.Of(err) != "vddkcp profile add a makes it" || !strings.Contains(err.Error(), none) {
		t.Errorf("%v (%s)", err, hinted.Of(err))
	}
}

func TestPlainSecretsNeedAPrivateFile(t *testing.T) {
	for _, key := range []string{"password", "cookie"} {
		for _, perm := range []os.FileMode{0o600, 0o400, 0o640, 0o604, 0o620, 0o602, 0o644, 0o666} {
			text := fmt.Sprintf(`{"servers": {"plain": {"server": "s", %q: "x"}, "file": {"server": "s", %q: "+/x"}, "none": {"server": "s"}}}`, key, key)
			path := write(t, "config.json", text, perm)
			_, err := New(path, "").Find("plain")
			want := fmt.Sprintf("has a %s in plain text, but the permissions of the file are %04o, want 0600", key, perm)
			var wrong *usage.Error
			if private := perm&0o077 == 0; private != (err == nil) {
				t.Errorf("%04o: %v", perm, err)
			} else if !private && (!strings.Contains(err.Error(), want) || !errors.As(err, &wrong) || !strings.HasPrefix(hinted.Of(err), "run chmod 600 "+path)) {
				t.Errorf("%04o: %v (%s), want %s", perm, err, hinted.Of(err), want)
			}
			for _, name := range []string{"file", "none"} {
				if _, err := New(path, "").Find(name); err != nil {
					t.Errorf("%04o: %v: no secret is in the file", perm, err)
				}
			}
		}
	}
	p := &Profile{Name: "p", File: "f", Password: Secret{Text: secret.New("x")}, access: access{mode: 0o600, owner: uint32(os.Geteuid() + 1)}}
	if err := p.CheckAccess(); err == nil || !strings.Contains(err.Error(), "belongs to the user ID") || !strings.Contains(hinted.Of(err), "chown") {
		t.Errorf("%v (%s): want an error about the owner", err, hinted.Of(err))
	}
}

func TestParseErrors(t *testing.T) {
	long := strings.Repeat("x", maxFile+1)
	for text, want := range map[string]string{
		"":                 "f:1:1: empty",
		" \n":              "f:1:1: empty",
		"{":                "f:1:1: unexpected end",
		"\ufeff{}":         "f:1:1: a byte order mark",
		"{\"servers\xff\"": "f:1:10: not UTF-8",
		"[]":               "f:1:1: found an array, want an object",
		"null":             "f:1:1: found null, want an object",
		"{} {}":            "f:1:4: an invalid character after top-level value",
		"{} // x":          "f:1:4: an invalid character after top-level value",
		`{"servers": {},}`: "f:1:16: an invalid character looking for",
		`{"server": {}}`:   `f:1:2: server: unknown key; did you mean "servers"?`,
		`{"version": 1}`:   `f:1:2: version: unknown key; the keys are servers`,
		"{\n \"servers\": {},\n \"servers\": {}}":                                "f:3:2: servers: the key occurs twice",
		`{"servers": []}`:                                                        "f:1:13: servers: found an array, want an object",
		`{"servers": {"a": 1}}`:                                                  "f:1:19: servers.a: found a number, want an object",
		`{"servers": {"a": {}}}`:                                                 `servers.a: the key "server" is missing`,
		`{"servers": {"a b": {"server": "s"}}}`:                                  `f:1:14: servers: "a b" cannot be the name`,
		`{"servers": {"": {"server": "s"}}}`:                                     `"" cannot be the name`,
		`{"servers": {"a": {"server": "s"}, "a": {}}}`:                           "f:1:36: servers.a: the key occurs twice",
		`{"servers": {"a": {"server": "s", "\u0073erver": "t"}}}`:                "servers.a.server: the key occurs twice",
		"{\"servers\": {\"a\": {\"server\": \"s\",\n\"pasword\": \"hunter2\"}}}": `f:2:1: servers.a.pasword: unknown key; did you mean "password"?`,
		`{"servers": {"a": {"Server": "s"}}}`:                                    `servers.a.Server: unknown key; did you mean "server"?`,
		`{"servers": {"a": {"server": "s", "x\n": 1}}}`:                          `servers.a."x\n": unknown key; the keys are server, user,`,
		`{"servers": {"a": {"server": "s", "password": 12345}}}`:                 "f:1:47: servers.a.password: found a number, want a string",
		`{"servers": {"a": {"server": "s", "password": ["hunter2"]}}}`:           "servers.a.password: found an array, want a string",
		`{"servers": {"a": {"server": "s", "password": null}}}`:                  "servers.a.password: found null, want a string",
		`{"servers": {"a": {"server": "s", "password": ""}}}`:                    "servers.a.password: the value is empty",
		`{"servers": {"a": {"server": "s", "password": "hunter2\n"}}}`:           "servers.a.password: the value has a control character",
		`{"servers": {"a": {"server": "s", "password": "+"}}}`:                   "servers.a.password: the value \"+\": the path of a file is missing",
		`{"servers": {"a": {"server": "s", "password": "-hunter2"}}}`:            "servers.a.password: the value begins with \"-\"",
		`{"servers": {"a": {"server": "s", "cookie": "-3"}}}`:                    "servers.a.cookie: the value begins with \"-\"",
		`{"servers": {"a": {"server": "s", "user": true}}}`:                      "servers.a.user: found true or false, want a string",
		`{"servers": {"a": {"server": "https://s"}}}`:                            `servers.a.server: "https://s": expected only the name or the address`,
		`{"servers": {"a": {"server": "s:443"}}}`:                                `servers.a.server: "s:443": expected only the name`,
		`{"servers": {"a": {"server": "s", "thumbprint": "AB"}}}`:                `servers.a.thumbprint: "AB" is not a thumbprint`,
		`{"servers": {"a": {"server": "s", "port": "443"}}}`:                     "servers.a.port: found a string, want a port number",
		`{"servers": {"a": {"server": "s", "port": 0}}}`:                         "servers.a.port: 0: want a port number",
		`{"servers": {"a": {"server": "s", "port": 65536}}}`:                     "servers.a.port: 65536: want a port number",
		`{"servers": {"a": {"server": "s", "port": 44.5}}}`:                      "servers.a.port: 44.5: want a port number",
		`{"servers": {"a": {"server": "s", "via": "https"}}}`:                    `servers.a.via: "https": want auto, vddk, nfc`,
		`{"servers": {"a": {"server": "s", "nfchostport": -1}}}`:                 "servers.a.nfchostport: -1: want a port number",
		`{"servers": {"ä": {"server": "s", "port": 1}, "b" 'hunter2'}}`:          "f:1:51: an invalid character after object key",
		long: "larger than 1048576 bytes",
	} {
		f, err := parse([]byte(text), "f")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80q: %v, want %s", text, err, want)
		}
		if f != nil || err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%.80q: %v, %v: want no profiles, and no password in the error", text, f, err)
		}
	}
}

func TestFileIsNoRegularFile(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, t.TempDir(), os.DevNull} {
		if _, err := New(path, "").Find("a"); err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestAddAndRemove(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "config", "vddkcp")
	path := filepath.Join(folder, "config.json")
	fresh := func() *Config { return New(path, "") }
	full := &Profile{
		Name: "b", Server: "vc", User: `DOM\u<ser>`, Password: Secret{Text: secret.New(`p"<&>ä`)}, Cookie: Secret{File: "/c"},
		Thumbprint: thumbprint, Port: 1, NFCHostPort: 2, LibDir: "/l", Via: "vddk",
	}
	for _, p := range []*Profile{full, {Name: "a", Server: "h", Password: Secret{File: "rel"}}} {
		if err := fresh().Add(p, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := fresh().Add(&Profile{Name: "b", Server: "x"}, false); !errors.Is(err, ErrExists) {
		t.Errorf("%v, want ErrExists", err)
	}
	want := *full
	want.File = path
	got, err := fresh().Find("b")
	if err != nil {
		t.Fatal(err)
	}
	got.access = access{}
	if *got != want || got.Password.Text.Reveal() != `p"<&>ä` {
		t.Errorf("got  %+v\nwant %+v", *got, want)
	}
	if a, err := fresh().Find("a"); err != nil || a.Password.File != folder+"/rel" {
		t.Errorf("%+v, %v", a, err)
	}
	text, err := os.ReadFile(path)
	if err != nil || strings.Index(string(text), `"b"`) > strings.Index(string(text), `"a"`) || !strings.Contains(string(text), `"password": "+rel"`) {
		t.Errorf("%v: want the order and the texts of the file to stay\n%s", err, text)
	}
	for path, mode := range map[string]os.FileMode{path: 0o600, folder: 0o700, filepath.Dir(folder): 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want %04o", path, info.Mode(), err, mode)
		}
	}
	// A file that others may read becomes private, also behind a link.
	elsewhere := filepath.Join(folder, "elsewhere")
	if err := errors.Join(os.Rename(path, elsewhere), os.Symlink("elsewhere", path), os.Chmod(elsewhere, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := fresh().Add(&Profile{Name: "b", Server: "new"}, true); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(elsewhere); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if b, err := fresh().Find("b"); err != nil || b.Server != "new" || b.User != "" {
		t.Errorf("%+v, %v", b, err)
	}
	if err := fresh().Remove("b"); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh().Find("b"); err == nil {
		t.Error("b is still there")
	}
	if _, err := fresh().Find("a"); err != nil {
		t.Error(err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode().Type() != os.ModeSymlink {
		t.Errorf("%v, %v: want the link", info.Mode(), err)
	}
}

func TestRefusedEdits(t *testing.T) {
	bad := write(t, "config.json", `{"servers": {"a": {"server": "s", "pasword": "x"}}}`, 0o600)
	system := write(t, "system.json", `{"servers": {"sys": {"server": "s"}}}`, 0o600)
	none := filepath.Join(t.TempDir(), "config.json")
	plain := func(text string) *Profile {
		return &Profile{Name: "n", Server: "s", Password: Secret{Text: secret.New(text)}}
	}
	for want, err := range map[string]error{
		"did you mean":                            New(bad, "").Add(&Profile{Name: "n", Server: "s"}, false),
		`1:35: servers.a.pasword`:                 New(bad, "").Remove("a"),
		"cannot be the name":                      New(none, "").Add(&Profile{Name: "a b", Server: "s"}, false),
		`begins with "+" or "-"`:                  New(none, "").Add(plain("+x"), false),
		`a password that begins`:                  New(none, "").Add(plain("-x"), false),
		"cannot be stored":                        New(none, "").Add(plain("x\n"), false),
		"n.server: \"s:1\"":                       New(none, "").Add(&Profile{Name: "n", Server: "s:1"}, false),
		"no place for the user's":                 New("", "").Add(plain("x"), false),
		"has no profile sy":                       New(none, system).Remove("sy"),
		"the profile sys is in " + system + ": r": New(none, system).Remove("sys"),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := os.Stat(none); err == nil {
		t.Error("a refused edit made a file")
	}
	if text, _ := os.ReadFile(bad); !strings.Contains(string(text), "pasword") {
		t.Error("a file with a mistake was replaced")
	}
}

// Profiles that several processes add at the same time are all stored.
func TestConcurrentAdd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.json")
	var group sync.WaitGroup
	for i := range 20 {
		group.Go(func() {
			if err := New(path, "").Add(&Profile{Name: fmt.Sprint("p", i), Server: "s"}, false); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if all, err := New(path, "").List(); err != nil || len(all) != 20 {
		t.Errorf("%d profiles, %v", len(all), err)
	}
}

func TestUserFile(t *testing.T) {
	for _, c := range []struct{ home, xdg, want string }{
		{"/h", "", "/h/.config/vddkcp/config.json"},
		{"/h", "/x", "/x/vddkcp/config.json"},
		{"/h", "relative", ""},
		{"", "", ""},
	} {
		t.Setenv("HOME", c.home)
		t.Setenv("XDG_CONFIG_HOME", c.xdg)
		if got := UserFile(); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestSameServer(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"vc.example.com", "VC.example.com.", true}, {"[::1]", "::1", true}, {"vc", "vc2", false}, {"vc", "vc.example.com", false}, {"", "", true},
	} {
		if got := SameServer(c.a, c.b); got != c.same {
			t.Errorf("%+v", c)
		}
	}
}
