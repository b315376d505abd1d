package profile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// ErrExists is the error of Add if there is a profile of that name.
var ErrExists = errors.New("there is a profile of that name")

// Add stores a profile in the user's configuration file, which only the user may read afterwards. A
// relative path in p starts from the folder of this file. If the file has a profile of the same name,
// Add replaces it if replace is true, and otherwise returns ErrExists. The other profiles in the file
// stay. When Add returns nil, the file is durable.
func (c *Config) Add(p *Profile, replace bool) error {
	if err := CheckName(p.Name); err != nil {
		return err
	}
	for what, secret := range map[string]Secret{"password": p.Password, "cookie": p.Cookie} {
		if text := secret.Text.Reveal(); strings.HasPrefix(text, "+") || strings.HasPrefix(text, "-") {
			return usage.New(fmt.Sprintf("a %[1]s that begins with \"+\" or \"-\" cannot be stored in a profile", what), fmt.Sprintf("write the %s to a file, and store +FILE", what))
		}
	}
	s := settings{
		Server: p.Server, User: p.User, Thumbprint: p.Thumbprint, Port: p.Port, NFCHostPort: p.NFCHostPort, LibDir: p.LibDir, Via: p.Via,
		Password: p.Password.setting(), Cookie: p.Cookie.setting(),
	}
	return c.edit(func(f *file) error {
		for i, old := range f.profiles {
			if old.Name != p.Name {
				continue
			}
			if !replace {
				return fmt.Errorf("%s: the profile %s: %w", c.user, p.Name, ErrExists)
			}
			f.settings[i] = s
			return nil
		}
		f.profiles = append(f.profiles, p)
		f.settings = append(f.settings, s)
		return nil
	})
}

func (s Secret) setting() string {
	if s.File != "" {
		return "+" + s.File
	}
	return s.Text.Reveal()
}

// Remove removes the profile with the given name from the user's configuration file.
func (c *Config) Remove(name string) error {
	if err := CheckName(name); err != nil {
		return usage.Wrap(err)
	}
	return c.edit(func(f *file) error {
		i := slices.Index(f.names(), name)
		if i < 0 {
			if system, err := c.readSystem(); err == nil && system.find(name) != nil {
				return usage.Errorf("the profile %s is in %s: remove it there", name, c.system)
			}
			if len(f.profiles) == 0 {
				return usage.Errorf("%s has no profile %s", c.user, name)
			}
			return c.unknown(name, f.names())
		}
		f.profiles = slices.Delete(f.profiles, i, i+1)
		f.settings = slices.Delete(f.settings, i, i+1)
		return nil
	})
}

// The method edit changes the user's configuration file. It holds a lock meanwhile, so that no change
// of another process is lost.
func (c *Config) edit(change func(*file) error) error {
	if c.user == "" {
		return hinted.Error(errors.New("there is no place for the user's configuration file"), "set the environment variable HOME or XDG_CONFIG_HOME")
	}
	folder := filepath.Dir(c.user)
	if err := makeFolder(folder); err != nil {
		return err
	}
	lock, err := os.Open(folder)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := eintr.Retry(func() error { return unix.Flock(int(lock.Fd()), unix.LOCK_EX) }); err != nil {
		return fmt.Errorf("cannot lock the folder %s: %w", folder, err)
	}
	f, err := load(c.user)
	if err != nil {
		return usage.Wrap(err)
	}
	if err := change(f); err != nil {
		return err
	}
	text, err := f.text()
	if err != nil {
		return err
	}
	if _, err := parse(text, c.user); err != nil {
		return fmt.Errorf("the profile cannot be stored: %w", err)
	}
	// A symbolic link at the path stays: some users keep their configuration files elsewhere.
	path, err := filepath.EvalSymlinks(c.user)
	if errors.Is(err, fs.ErrNotExist) {
		path = c.user
	} else if err != nil {
		return err
	}
	return durable.Replace(path, text, durable.Private)
}

// makeFolder creates a folder that only the user may read, unless it exists. It makes the names of the
// folder and of its parent durable, such as ~/.config/vddkcp and ~/.config.
func makeFolder(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	parent := filepath.Dir(path)
	return errors.Join(durable.SyncFolder(parent), durable.SyncFolder(filepath.Dir(parent)))
}

// The method text returns the text of the configuration file.
func (f *file) text() ([]byte, error) {
	var servers bytes.Buffer
	servers.WriteString(`{"servers":{`)
	for i, s := range f.settings {
		if i > 0 {
			servers.WriteByte(',')
		}
		fmt.Fprintf(&servers, "%q:", f.profiles[i].Name)
		e := json.NewEncoder(&servers)
		e.SetEscapeHTML(false)
		if err := e.Encode(s); err != nil {
			return nil, err
		}
	}
	servers.WriteString("}}")
	var text bytes.Buffer
	if err := json.Indent(&text, servers.Bytes(), "", "  "); err != nil {
		return nil, err
	}
	text.WriteByte('\n')
	return text.Bytes(), nil
}
