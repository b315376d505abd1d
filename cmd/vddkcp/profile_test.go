package main

import (
	"bytes"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/profile"
)

// converse types each answer when the terminal shows the prompt before it, and returns all that the
// terminal showed.
func converse(t *testing.T, terminal *os.File, dialog [][2]string) string {
	t.Helper()
	var all, since bytes.Buffer
	b := make([]byte, 4096)
	for {
		n, err := terminal.Read(b)
		all.Write(b[:n])
		since.Write(b[:n])
		if len(dialog) > 0 && strings.Contains(since.String(), dialog[0][0]) {
			if _, err := terminal.WriteString(dialog[0][1] + "\n"); err != nil {
				t.Fatal(err)
			}
			dialog = dialog[1:]
			since.Reset()
		}
		if err != nil {
			if len(dialog) > 0 {
				t.Errorf("%q was not asked", dialog[0][0])
			}
			return all.String()
		}
	}
}

// TestProfileAddAsks answers the questions of vddkcp profile add on a terminal.
func TestProfileAddAsks(t *testing.T) {
	server := httptest.NewTLSServer(nil)
	t.Cleanup(server.Close)
	host, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	got, err := certificate.Fetch(t.Context(), host, uint32(server.Listener.Addr().(*net.TCPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	trust := [2]string{"Its SHA-256 thumbprint is " + got.SHA256 + ".\r\nCompare it with the one that the host itself shows. Trust this certificate? (yes or no): ", "yes"}
	store := [2]string{"Store the profile new in ", "y"}
	secretFile := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(secretFile, []byte("hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args   []string
		dialog [][2]string
		exit   int
		want   profile.Profile // Name "": nothing is stored
		plain  string          // password
		out    string
	}{
		"all": {
			args: []string{"--port", port},
			dialog: [][2]string{
				{"name or address of the server: ", " " + host + " "}, trust, {"user name: ", "backup"},
				{"file that has the password in its first line", ""}, {"password of backup at " + host + " (empty: store none): ", "hunter2"}, store,
			},
			want: profile.Profile{Name: "new", Server: host, User: "backup", Thumbprint: got.SHA256}, plain: "hunter2",
			out: "the profile new is stored in ",
		},
		"a file": {
			args:   []string{"--server", host, "--port", port, "--user", "u"},
			dialog: [][2]string{trust, {"file that has the password", "+" + secretFile}, store},
			want:   profile.Profile{Name: "new", Server: host, User: "u", Thumbprint: got.SHA256, Password: profile.Secret{File: secretFile}},
		},
		"no password": {
			args:   []string{"--server", host, "--port", port, "--user", "u", "--thumbprint", got.SHA1},
			dialog: [][2]string{{"file that has the password", ""}, {"password of u at", ""}, store},
			want:   profile.Profile{Name: "new", Server: host, User: "u", Thumbprint: got.SHA1},
		},
		"only what is missing": {
			args:   []string{"--server", host, "--port", port, "--thumbprint", got.SHA1, "--yes", "--password", "+" + secretFile},
			dialog: [][2]string{{"user name: ", "u"}},
			want:   profile.Profile{Name: "new", Server: host, User: "u", Thumbprint: got.SHA1, Password: profile.Secret{File: secretFile}},
		},
		"no trust": {
			args: []string{"--server", host, "--port", port, "--user", "u"}, dialog: [][2]string{{trust[0], "no"}}, exit: 1, out: "profile add: the profile is not stored",
		},
		"nothing typed": {
			args: []string{"--server", host, "--port", port, "--user", "u"}, dialog: [][2]string{{trust[0], ""}}, exit: 1, out: "the profile is not stored",
		},
		"no yes": {
			args:   []string{"--server", host, "--port", port, "--user", "u", "--thumbprint", got.SHA1, "--password", "+" + secretFile},
			dialog: [][2]string{{store[0], "maybe"}}, exit: 1, out: "the profile is not stored",
		},
		"no server": {dialog: [][2]string{{"name or address of the server: ", ""}}, exit: 1},
		"not replaced": {
			args: []string{"--force=false", "--server", host, "--port", port, "--user", "u"}, exit: 1,
			dialog: [][2]string{{"There is a profile old for the server s. Replace it? (yes or no): ", "n"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("XDG_CONFIG_HOME", t.TempDir())
			config := newConfig()
			if err := config.Add(&profile.Profile{Name: "old", Server: "s"}, false); err != nil {
				t.Fatal(err)
			}
			added := "new"
			if name == "not replaced" {
				added = "old"
			}
			cmd := command(t, append([]string{"profile", "add", added}, c.args...)...)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			terminal, err := startOnTerminal(cmd)
			if err != nil {
				t.Fatal(err)
			}
			defer terminal.Close()
			shown := converse(t, terminal, c.dialog)
			cmd.Wait()
			if status := cmd.ProcessState.ExitCode(); status != c.exit || !strings.Contains(out.String(), c.out) {
				t.Errorf("exit status %d, want %d and %q\n%s\n%s", status, c.exit, c.out, out.String(), shown)
			}
			if strings.Contains(out.String()+shown, "hunter2") {
				t.Errorf("the password is shown\n%s\n%s", out.String(), shown)
			}
			if mode, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS); err != nil || mode.Lflag&unix.ECHO == 0 {
				t.Errorf("%v: the terminal does not show what is typed", err)
			}
			all, err := newConfig().List()
			if err != nil || c.want.Name == "" != (len(all) == 1) || all[len(all)-1].Name != "old" {
				t.Fatalf("%d profiles, %v", len(all), err)
			}
			if c.want.Name == "" {
				return
			}
			p, err := newConfig().Find("new")
			if err != nil {
				t.Fatal(err)
			}
			if p.Server != c.want.Server || p.User != c.want.User || p.Thumbprint != c.want.Thumbprint || decimal(p.Port) != port ||
				p.Password.File != c.want.Password.File || p.Password.Text.Reveal() != c.plain {
				t.Errorf("stored %+v\nwant %+v", p, c.want)
			}
		})
	}
}
