package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/grace"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// connectionVariables are the environment variables that say where a server and the VDDK library
// are and how to log in, except those of the secrets.
var connectionVariables = []string{
	"VDDKCP_PROFILE", "VDDKCP_SERVER", "VDDKCP_USER", "VDDKCP_THUMBPRINT", "VDDKCP_PORT", "VDDKCP_NFCHOSTPORT", "VDDKCP_LIBDIR", "VDDKCP_VIA",
}

// cleanEnvironment removes the connectionVariables that count as unset. These are empty
// variables, because scripts leave variables empty instead of unsetting them. Kubernetes sets
// VDDKCP_PORT to a URL such as tcp://10.0.0.1:10809 in every pod if a service is called vddkcp.
// This is not meant for vddkcp, so this variable counts as unset too.
func cleanEnvironment() {
	for _, name := range connectionVariables {
		value, ok := os.LookupEnv(name)
		if ok && value == "" || name == "VDDKCP_PORT" && strings.HasPrefix(value, "tcp://") {
			os.Unsetenv(name)
		}
	}
}

// flagsFirst resolves nothing. With any resolver, kong ignores a wrong value of an environment
// variable if the command line has the flag of this variable. Without one, it returns an error.
var flagsFirst = kong.ResolverFunc(func(*kong.Context, *kong.Path, *kong.Flag) (any, error) { return nil, nil })

// wrongVariable matches an error of kong about the value of an environment variable.
var wrongVariable = regexp.MustCompile(`(?s)^(?:--[a-z-]+: )?(.*?) \(from envar (VDDKCP_[A-Z]+)=.*\)$`)

// aboutVariable changes an error of kong about the value of an environment variable so that it
// begins with the name of the variable. It returns any other error unchanged.
func aboutVariable(err error) error {
	if parts := wrongVariable.FindStringSubmatch(err.Error()); parts != nil {
		return fmt.Errorf("the environment variable %s: %s", parts[2], parts[1])
	}
	return err
}

// The type login finds out which server is meant and how to log in there. The flags, the
// environment and a profile can each have a part of that. All disks of a command share one
// login, which reads secrets only once. A login is safe for concurrent use.
type login struct {
	environment *secretEnvironment
	config      *profile.Config
	given       map[string]bool // names of the flags on the command line or in the job
	ofJob       bool            // given has flags of a job, not of the command line
	pause       func() (resume func())

	mu               sync.Mutex        // guards the following fields
	from             map[string]origin // by the name of the flag
	resolved         *settled
	failed           error // of resolve
	password, cookie secret.Secret
	read             bool // password and cookie were read

	logged []string // lines of provenance that were logged

	warned sync.Once // warnings about flags
}

// settled has the values of a connection, and where each of them comes from.
type settled struct {
	server, user, thumbprint string
	port                     uint32
	password, cookie         secretSource
	profile                  *profile.Profile // nil if no profile is used

	login       *login
	environment bool     // the variables that belong to a server may be used
	hintNotes   []string // values that are not used because they belong to another server or user
}

func newLogin(environment *secretEnvironment, config *profile.Config, given map[string]bool) *login {
	return &login{environment: environment, config: config, given: given, from: map[string]origin{}}
}

// The type origin has the value of a flag as text, and where it comes from, such as "VDDKCP_USER".
type origin struct{ value, from string }

// The method resolve finds out which values count. A value on the command line takes precedence
// over one in the environment, and that over one in the profile. The environment and the profile
// may each name a server. Their values are used only for this server, so that no password is sent
// to another one.
func (f *serverFlags) resolve() (*settled, error) {
	l := f.login
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.resolved == nil && l.failed == nil {
		l.resolved, l.failed = l.resolve(f)
	}
	return l.resolved, l.failed
}

func (l *login) resolve(f *serverFlags) (*settled, error) {
	r := &settled{login: l}
	environment, named := os.Getenv("VDDKCP_SERVER"), f.Server // f.Server is that of the environment if the flag is not given
	if err := r.selectProfile(f); err != nil {
		return nil, err
	}
	if named == "" && !l.given["server"] && r.profile != nil {
		named = r.profile.Server
	}
	r.environment = environment == "" || profile.SameServer(environment, named)
	of := r.ofProfile()
	r.server = profile.WithoutBrackets(pick(r, "server", "VDDKCP_SERVER", f.Server, of.Server))
	r.user = pick(r, "user", "VDDKCP_USER", f.User, of.User)
	r.thumbprint = pick(r, "thumbprint", "VDDKCP_THUMBPRINT", f.Thumbprint, of.Thumbprint)
	r.port = uint32(pick(r, "port", "VDDKCP_PORT", f.Port, portFlag(of.Port)))
	variables := l.environment
	if variables == nil {
		variables = new(secretEnvironment)
	}
	r.password = r.secret("password", f.Password, variables.password, of.Password)
	r.cookie = r.secret("cookie", f.Cookie, variables.cookie, of.Cookie)
	if !r.environment {
		r.hintNotes = append(r.hintNotes, fmt.Sprintf("variables such as VDDKCP_PASSWORD are not used, because VDDKCP_SERVER names another server, %s", printable.Name(environment)))
	}
	return r, nil
}

// The method selectProfile finds the profile that the flag --profile or VDDKCP_PROFILE names.
func (r *settled) selectProfile(f *serverFlags) error {
	if f.Profile == "" {
		return nil
	}
	l := r.login
	from := cmp.Or(l.fromFlag("profile"), "VDDKCP_PROFILE")
	flag := "--profile" // for a job, package batch changes this to the name of the field
	if !l.given["profile"] {
		flag = "VDDKCP_PROFILE"
	}
	p, err := l.config.Find(f.Profile)
	if err != nil {
		return usage.WithHint(fmt.Errorf("%s: %w", flag, err), hinted.Of(err))
	}
	if f.Server != "" && !profile.SameServer(f.Server, p.Server) {
		if !l.given["profile"] && l.given["server"] {
			r.hintNotes = append(r.hintNotes, fmt.Sprintf("the profile %s of VDDKCP_PROFILE is not used, because it is for another server, %s", p.Name, printable.Name(p.Server)))
			return nil
		}
		server := cmp.Or(l.fromFlag("server"), "VDDKCP_SERVER")
		return usage.New(
			fmt.Sprintf("%s: the profile %s in %s is for the server %s, but %s names the server %s", flag, p.Name, printable.Name(p.File), printable.Name(p.Server), server, printable.Name(f.Server)),
			fmt.Sprintf("leave out %s or %s: the login of a profile is never used for another server", from, server))
	}
	r.profile = p
	r.login.from["profile"] = origin{p.Name, from}
	return nil
}

// The method fromFlag returns what messages call the flag or the field of a job with the given
// name. It returns "" if it is not given.
func (l *login) fromFlag(name string) string {
	switch {
	case !l.given[name]:
		return ""
	case l.ofJob:
		return "the field " + name + " of the job"
	}
	return "--" + name
}

// The function pick returns the value that counts for a flag, and records where it comes from.
// The parameter field is the field of the flag, which kong has set to the value of the variable
// if the flag is not given.
func pick[T comparable](r *settled, name, variable string, field, inProfile T) T {
	var none T
	switch {
	case r.login.given[name]:
		if field != none {
			r.record(name, field, r.login.fromFlag(name))
		}
		return field
	case field != none && r.environment:
		r.record(name, field, variable)
		return field
	case inProfile != none:
		r.record(name, inProfile, r.fromProfile())
		return inProfile
	}
	return none
}

func (r *settled) record(name string, value any, from string) {
	r.login.from[name] = origin{printable.Name(fmt.Sprint(value)), from}
}

func (r *settled) fromProfile() string {
	return fmt.Sprintf("profile %s in %s", r.profile.Name, printable.Name(r.profile.File))
}

// The method secret returns where a password or a cookie comes from, and records it. A secret of
// the environment or of the profile is used only for the user that it belongs to.
func (r *settled) secret(name string, flag secretFlag, variable secret.Secret, inProfile profile.Secret) secretSource {
	var s secretSource
	switch {
	case flag.form != notGiven:
		s = secretSource{flag: flag, from: cmp.Or(r.login.fromFlag(name), "--"+name)}
	case variable.IsSet() && r.environment && r.sameUser(os.Getenv("VDDKCP_USER"), "VDDKCP_"+strings.ToUpper(name)):
		s = secretSource{text: variable, from: "VDDKCP_" + strings.ToUpper(name)}
	case name == "cookie" && r.password.isSet() && !r.password.ofProfile(r):
		return s // the password was chosen for this command, and a cookie would be used instead of it
	case inProfile.IsSet() && r.sameUser(r.profile.User, "the "+name+" of the profile "+r.profile.Name):
		s = secretSource{text: inProfile.Text, from: r.fromProfile()}
		if inProfile.File != "" {
			s.flag = secretFlag{form: inFile, value: inProfile.File}
		}
	default:
		return s
	}
	r.login.from[name] = origin{map[secretForm]string{onTerminal: "typed on the terminal", inFile: "in a file", onFD: "on a file descriptor"}[s.flag.form], s.from}
	return s
}

func (s secretSource) ofProfile(r *settled) bool {
	return r.profile != nil && s.from == r.fromProfile()
}

// The method sameUser reports whether a secret that belongs to the given user may be used. If user
// is "", the secret may be used for every user. The parameter secret is what messages call it.
func (r *settled) sameUser(user, secret string) bool {
	if user == "" || r.user == "" || strings.EqualFold(user, r.user) {
		return true
	}
	r.hintNotes = append(r.hintNotes, fmt.Sprintf("%s is not used, because it belongs to another user, %s", secret, printable.Name(user)))
	return false
}

// The method explain changes an error that begins with the name of a flag, such as "--server: ",
// so that it names the variable or the profile that the value comes from. To the hint of an error
// about missing values, it adds why some values were not used.
func (r *settled) explain(err error) error {
	text, hint := err.Error(), hinted.Of(err)
	if strings.HasPrefix(text, "missing: ") && len(r.hintNotes) > 0 {
		return usage.WithHint(err, strings.Join(append(r.hintNotes, hint), "; "))
	}
	name, rest, ok := strings.Cut(text, ": ")
	name, isFlag := strings.CutPrefix(name, "--")
	from := r.login.from[name].from
	if !ok || !isFlag || from == "" || r.login.given[name] {
		return err
	}
	return usage.WithHint(fmt.Errorf("%s: %s", from, rest), hint)
}

// The method library returns the folder of the VDDK library and the NFC port that count. The
// parameters flagDir and flagPort are the fields of the flags --libdir and --nfchostport. For a
// disk on this machine, r is nil, and the profile is not used.
func (f *serverFlags) library(r *settled, flagDir string, flagPort portFlag) (libDir string, nfcHostPort uint32) {
	if r == nil {
		r = &settled{login: f.login}
	} else {
		nfcHostPort = f.nfcPort(r, flagPort)
	}
	f.login.mu.Lock()
	defer f.login.mu.Unlock()
	anyServer := &settled{login: r.login, profile: r.profile, environment: true} // VDDKCP_LIBDIR belongs to no server
	return pick(anyServer, "libdir", "VDDKCP_LIBDIR", flagDir, r.ofProfile().LibDir), nfcHostPort
}

// The method nfcPort returns the NFC port that counts. The parameter flag is the field of the flag
// --nfchostport.
func (f *serverFlags) nfcPort(r *settled, flag portFlag) uint32 {
	f.login.mu.Lock()
	defer f.login.mu.Unlock()
	return uint32(pick(r, "nfchostport", "VDDKCP_NFCHOSTPORT", flag, portFlag(r.ofProfile().NFCHostPort)))
}

// The method via returns the value of --via that counts, and where it comes from. The parameter
// flag is the field of the flag.
func (f *serverFlags) via(r *settled, flag viaFlag) (value viaFlag, from string) {
	f.login.mu.Lock()
	defer f.login.mu.Unlock()
	value = pick(r, "via", "VDDKCP_VIA", flag, viaFlag(r.ofProfile().Via))
	return value, f.login.from["via"].from
}

// The method ofProfile returns the profile that is used. If none is used, the result has no values.
func (r *settled) ofProfile() *profile.Profile {
	if r.profile == nil {
		return new(profile.Profile)
	}
	return r.profile
}

// The method readSecrets returns the password and the cookie. The first call reads them, and may
// ask the user for them. It must be called after resolve.
func (l *login) readSecrets(ctx context.Context, warn func(string)) (password, cookie secret.Secret, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.read {
		return l.password, l.cookie, nil
	}
	r := l.resolved
	if !l.ofJob {
		for _, note := range r.hintNotes {
			warn(note)
		}
	}
	password, cookie = r.password.text, r.cookie.text
	for _, s := range []struct {
		name   string
		source secretSource
		into   *secret.Secret
	}{
		{"password", r.password, &password}, {"cookie", r.cookie, &cookie},
	} {
		flag := s.source.flag
		if flag.form == notGiven {
			continue
		}
		if flag.form == inPlain {
			warn(fmt.Sprintf("other users of this host can see a --%s on the command line: use -, +FILE or VDDKCP_%s instead", s.name, strings.ToUpper(s.name)))
		}
		text, err := flag.read(ctx, l.pause, fmt.Sprintf("%s of %s at %s", s.name, printable.Name(r.user), printable.Name(r.server)))
		if grace.Original(ctx).Err() != nil {
			return secret.Secret{}, secret.Secret{}, err
		}
		if err != nil {
			what := "--" + s.name
			if s.source.ofProfile(r) {
				what = s.source.from + ": " + s.name
			}
			return secret.Secret{}, secret.Secret{}, usage.WithHint(fmt.Errorf("%s: %w", what, err), hinted.Of(err))
		}
		*s.into = text
	}
	l.password, l.cookie, l.read = password, cookie, true
	return password, cookie, nil
}

// The method expected returns which secrets the method readSecrets will return. An empty
// secret stands for each secret that is not read yet.
func (l *login) expected() (password, cookie secret.Secret) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.read {
		return l.password, l.cookie
	}
	return l.resolved.password.expected(), l.resolved.cookie.expected()
}

// The method origin returns where the value of a flag comes from, such as "VDDKCP_USER".
func (l *login) origin(name string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.from[name].from
}

// The method provenance returns a line for each value that was used so far.
func (l *login) provenance() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, name := range []string{"profile", "server", "port", "user", "password", "cookie", "thumbprint", "nfchostport", "libdir", "via"} {
		if o, ok := l.from[name]; ok {
			lines = append(lines, strings.TrimSuffix(name+" "+o.value, " ")+" ("+o.from+")")
		}
	}
	if l.resolved != nil {
		lines = append(lines, l.resolved.hintNotes...)
	}
	return lines
}

// The method firstLog reports whether it is called for the first time with the given line.
func (l *login) firstLog(line string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.Contains(l.logged, line) {
		return false
	}
	l.logged = append(l.logged, line)
	return true
}
