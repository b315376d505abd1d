// Package profile reads and edits the configuration files of vddkcp. They name servers and say how
// to log in there. A profile is one such server with its settings:
//
//	config := profile.New(profile.UserFile(), profile.SystemFile)
//	p, err := config.Find("vc1")
//
// A [Config] reads each of its two files when it first needs it, so that a command that uses no
// profile does not depend on these files. docs/cli.md describes the format of the files.
package profile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/nearest"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// SystemFile is the path of the configuration file for all users of the machine.
const SystemFile = "/etc/vddkcp/config.json"

// UserFile returns the path of the user's configuration file. It returns "" if the environment does
// not say where the user's configuration files are.
func UserFile() string {
	dir, err := os.UserConfigDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "vddkcp", "config.json")
}

// Profile is a server with a name, and how to log in there. A setting that the profile does not
// have is the zero value.
type Profile struct {
	Name string
	File string // path of the configuration file that has the profile

	Server      string // always set
	User        string
	Password    Secret
	Cookie      Secret
	Thumbprint  string
	Port        uint32
	NFCHostPort uint32
	LibDir      string // an absolute path
	Via         string // one of Vias

	access access
}

// Vias are the values of --via, which says how disks on servers are read.
var Vias = []string{"auto", "vddk", "nfc"}

// Secret says where a secret is: in Text, or in the first line of a file. If neither is set, the
// profile does not have the secret.
type Secret struct {
	Text secret.Secret
	File string // an absolute path; messages do not show it, because a user may have written a password there
}

// IsSet reports whether the profile has the secret.
func (s Secret) IsSet() bool { return s.Text.IsSet() || s.File != "" }

// access says who may read a configuration file.
type access struct {
	mode  fs.FileMode
	owner uint32
}

// Config is the profiles in the configuration file of the user and in that of the machine. If both
// files have a profile of the same name, that of the user is used. The methods are safe for
// concurrent use.
type Config struct {
	user, system         string
	readUser, readSystem func() (*file, error)
}

// New returns a Config with the configuration files at the given paths. Either path may be "".
func New(user, system string) *Config {
	return &Config{
		user: user, system: system,
		readUser:   sync.OnceValues(func() (*file, error) { return load(user) }),
		readSystem: sync.OnceValues(func() (*file, error) { return load(system) }),
	}
}

// Files returns the paths of the configuration files, that of the user first.
func (c *Config) Files() []string {
	return slices.DeleteFunc([]string{c.user, c.system}, func(path string) bool { return path == "" })
}

// UserProfile returns the profile with the given name in the user's configuration file, or nil if
// there is none.
func (c *Config) UserProfile(name string) (*Profile, error) {
	f, err := c.readUser()
	if err != nil {
		return nil, usage.Wrap(err)
	}
	return f.find(name), nil
}

// UserFile returns the path of the user's configuration file. It may be "".
func (c *Config) UserFile() string { return c.user }

// Find returns the profile with the given name. The error is a *usage.Error if there is no such
// profile, if a file that had to be read has a mistake, or if other users could read a secret in the
// profile's file.
func (c *Config) Find(name string) (*Profile, error) {
	if err := CheckName(name); err != nil {
		return nil, usage.Wrap(err)
	}
	var known []string
	for _, read := range []func() (*file, error){c.readUser, c.readSystem} {
		f, err := read()
		if err != nil {
			return nil, usage.Wrap(err)
		}
		if p := f.find(name); p != nil {
			if err := p.CheckAccess(); err != nil {
				return nil, usage.Wrap(err)
			}
			return p, nil
		}
		known = append(known, f.names()...)
	}
	return nil, c.unknown(name, known)
}

// The method unknown returns the error for a profile that does not exist. known has the names of the
// profiles that exist.
func (c *Config) unknown(name string, known []string) error {
	slices.Sort(known)
	known = slices.Compact(known)
	if len(known) == 0 {
		return usage.New(fmt.Sprintf("there is no profile %s: no profile is in %s", name, strings.Join(c.Files(), " or ")),
			"vddkcp profile add "+name+" makes it")
	}
	message := fmt.Sprintf("there is no profile %s", name)
	if near, ok := nearest.Near(name, known); ok {
		message += fmt.Sprintf("; did you mean %s?", near)
	}
	const maxListed = 20
	list := strings.Join(known[:min(len(known), maxListed)], ", ")
	if more := len(known) - maxListed; more > 0 {
		list += fmt.Sprintf(" and %d more", more)
	}
	return usage.New(message, "the profiles are: "+list)
}

// List returns the profiles of both files, sorted by name. If only one of the files can be read, it
// returns the profiles in this file and an error.
func (c *Config) List() ([]*Profile, error) {
	var all []*Profile
	var failed []error
	for _, read := range []func() (*file, error){c.readUser, c.readSystem} {
		f, err := read()
		if err != nil {
			failed = append(failed, err)
			continue
		}
		for _, p := range f.profiles {
			if !slices.ContainsFunc(all, func(other *Profile) bool { return other.Name == p.Name }) {
				all = append(all, p)
			}
		}
	}
	slices.SortFunc(all, func(a, b *Profile) int { return strings.Compare(a.Name, b.Name) })
	return all, errors.Join(failed...)
}

// CheckAccess returns an error if the profile has a secret in plain text, and other users could read
// its file or could have written it.
func (p *Profile) CheckAccess() error {
	what := ""
	switch {
	case p.Password.Text.IsSet():
		what = "password"
	case p.Cookie.Text.IsSet():
		what = "cookie"
	default:
		return nil
	}
	elsewhere := fmt.Sprintf(`, or write the %[1]s to a file of its own and "%[1]s": "+FILE" into the profile`, what)
	if p.access.mode.Perm()&0o077 != 0 {
		return hinted.Error(fmt.Errorf("%s: the profile %s has a %s in plain text, but the permissions of the file are %04o, want 0600", p.File, p.Name, what, p.access.mode.Perm()),
			"run chmod 600 "+p.File+elsewhere)
	}
	if int(p.access.owner) != os.Geteuid() {
		return hinted.Error(fmt.Errorf("%s: the profile %s has a %s in plain text, but the file belongs to the user ID %d, and vddkcp runs as the user ID %d", p.File, p.Name, what, p.access.owner, os.Geteuid()),
			fmt.Sprintf("run chown %d %s and chmod 600 %[2]s%s", os.Geteuid(), p.File, elsewhere))
	}
	return nil
}

// maxName is the largest number of characters in the name of a profile.
const maxName = 64

// CheckName returns an error if name can't be the name of a profile.
func CheckName(name string) error {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	if name == "" || len(name) > maxName || strings.Trim(name, letters) != "" {
		return fmt.Errorf("%.80q cannot be the name of a profile: want 1 to %d letters, digits, dots, underscores and hyphens", name, maxName)
	}
	return nil
}

// CheckServer returns an error if s is not the name or the address of a host. Brackets around an
// IPv6 address are allowed.
func CheckServer(s string) error {
	host := WithoutBrackets(s)
	switch {
	case host == "" || strings.ContainsAny(host, "/ \t\r\n\x00@[]") || strings.HasPrefix(host, "-"):
		return fmt.Errorf("%.200q: expected only the name or the address of a host", s)
	case strings.Count(host, ":") == 1:
		return hinted.Error(fmt.Errorf("%.200q: expected only the name or the address of a host", s),
			`give the port by itself, with --port or as the key "port" of a profile`)
	}
	return nil
}

// SameServer reports whether a and b are the same name or address of a server.
func SameServer(a, b string) bool {
	plain := func(s string) string { return strings.TrimSuffix(WithoutBrackets(s), ".") }
	return strings.EqualFold(plain(a), plain(b))
}

// WithoutBrackets returns the address in "[::1]" without its brackets.
func WithoutBrackets(server string) string {
	if address, ok := strings.CutPrefix(server, "["); ok {
		return strings.TrimSuffix(address, "]")
	}
	return server
}
