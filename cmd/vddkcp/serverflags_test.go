package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vsphere"
)

func TestConnection(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(path, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	thumbprint := strings.Repeat("ab", 20)
	for name, c := range map[string]struct {
		args        []string
		environment *secretEnvironment
		want        vsphere.Options
		err         string
	}{
		"all": {
			args: []string{"--server", "[::1]", "--port", "8443", "--user", "u", "--password", "+" + path, "--thumbprint", thumbprint},
			want: vsphere.Options{Server: "::1", Port: 8443, User: "u", Password: secret.New("secret"), Thumbprint: thumbprint},
		},
		"a password of the environment": {
			args: []string{"--server", "h", "--user", "u"}, environment: &secretEnvironment{password: secret.New("e")},
			want: vsphere.Options{Server: "h", User: "u", Password: secret.New("e")},
		},
		"a cookie": {args: []string{"--server", "h", "--cookie", "c"}, want: vsphere.Options{Server: "h", Cookie: secret.New("c")}},
		"nothing":  {err: "missing: --server, --user, --password or --cookie"},
		"a port":   {args: []string{"--server", "h:443", "--cookie", "c"}, err: "--server: \"h:443\": expected only"},
		"a URL":    {args: []string{"--server", "https://h", "--cookie", "c"}, err: "--server: \"https://h\": expected only"},
		"a short thumbprint": {
			args: []string{"--server", "h", "--cookie", "c", "--thumbprint", "abc"}, err: "--thumbprint: \"abc\"",
		},
		"no such file": {args: []string{"--server", "h", "--user", "u", "--password", "+" + path + "2"}, err: "--password: cannot read the file"},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := parsed(c.environment, append([]string{"a", "b"}, c.args...)...)
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.connection(t.Context(), func(string) {})
			var wrong *usage.Error
			if c.err != "" && (err == nil || !strings.HasPrefix(err.Error(), c.err) || !errors.As(err, &wrong)) || c.err == "" && err != nil {
				t.Fatalf("%v, want %q", err, c.err)
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v\nwant %+v", got, c.want)
			}
		})
	}
}
