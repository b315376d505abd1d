package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vsphere"
)

// serverFlags are the flags of every command that logs in to an ESXi host or a vCenter
// server. kong sets a field to the value of the environment variable in its tag if the flag
// is not given. Code that needs the values calls connection or resolve instead of reading
// the fields, because these methods also take the profile into account, and because not all
// values of the environment may be used together.
type serverFlags struct {
	Profile    string     `help:"Use the server and the login of the profile NAME, which a configuration file of vddkcp has. Flags and environment variables take precedence over single values." env:"VDDKCP_PROFILE" placeholder:"NAME" group:"VDDK:"`
	Server     string     `help:"Name or address of the ESXi host or vCenter server." env:"VDDKCP_SERVER" placeholder:"HOST" group:"VDDK:"`
	User       string     `help:"User name for the server." env:"VDDKCP_USER" placeholder:"NAME" group:"VDDK:"`
	Password   secretFlag `help:"Password for the server: \"-\" asks for it on the terminal, +FILE reads the first line of a file, -FD reads the first line from a file descriptor, and any other VALUE is the password itself, which other users can see in the list of processes. Default: the environment variable VDDKCP_PASSWORD." placeholder:"-|+FILE|-FD|VALUE" group:"VDDK:"`
	Cookie     secretFlag `help:"Session cookie to use instead of user name and password, in the same forms as --password. Default: the environment variable VDDKCP_COOKIE." placeholder:"-|+FILE|-FD|VALUE" group:"VDDK:"`
	Thumbprint string     `help:"SHA-1 or SHA-256 thumbprint of the server's certificate. Without this flag, a trusted authority must have signed the certificate." env:"VDDKCP_THUMBPRINT" placeholder:"HEX" group:"VDDK:"`
	Port       portFlag   `help:"Port of the server (default 443)." env:"VDDKCP_PORT" placeholder:"PORT" group:"VDDK:"`
	login      *login     `kong:"-"`
}

// diskFlags are flags that only commands that open disks need. Commands that only ask the server
// accept them without effect, so that a script can pass the same flags to all commands.
type diskFlags struct {
	NFCHostPort portFlag `name:"nfchostport" help:"Has no effect. The flag is accepted because other commands have it." placeholder:"PORT" group:"VDDK:"`
	Via         viaFlag  `help:"Has no effect. The flag is accepted because other commands have it." enum:",auto,vddk,nfc" default:"" placeholder:"auto|vddk|nfc" group:"VDDK:"`
	LibDir      string   `name:"libdir" help:"Has no effect. The flag is accepted because other commands have it." placeholder:"DIR" group:"VDDK:"`
}

// AfterApply is called by kong after parsing.
func (f *serverFlags) AfterApply(environment *secretEnvironment, parsed *kong.Context) error {
	given := map[string]bool{}
	for _, p := range parsed.Path {
		if p.Flag != nil && !p.Resolved {
			given[p.Flag.Name] = true
		}
	}
	f.login = newLogin(environment, newConfig(), given)
	return nil
}

// systemConfig is the path of the configuration file for all users. Tests change it.
var systemConfig = profile.SystemFile

// newConfig returns the configuration files of the user and of the machine, which are not read yet.
func newConfig() *profile.Config { return profile.New(profile.UserFile(), systemConfig) }

// The method namesServer reports whether one of the flags on the command line means that the
// disk is on a server. Environment variables and a profile that an environment variable names
// do not count, because otherwise the same command would open a local disk or a remote disk
// depending on the environment.
func (f *serverFlags) namesServer() bool {
	given := f.login.given
	return given["profile"] && f.Profile != "" || given["server"] && f.Server != "" || given["user"] && f.User != "" ||
		given["thumbprint"] && f.Thumbprint != "" || given["port"]
}

// The method connection returns how to reach the server and how to log in there, for
// commands that need only the server and no disk. It checks all other flags before it reads
// the secrets, which may ask the user. The parameter warn is called with warnings.
func (f *serverFlags) connection(ctx context.Context, warn func(string)) (vsphere.Options, error) {
	r, err := f.resolve()
	if err != nil {
		return vsphere.Options{}, err
	}
	if err := r.validate(); err != nil {
		return vsphere.Options{}, r.explain(err)
	}
	password, cookie, err := f.login.readSecrets(ctx, warn)
	if err != nil {
		return vsphere.Options{}, err
	}
	return vsphere.Options{
		Server: r.server, Port: r.port, User: r.user, Thumbprint: r.thumbprint, Password: password, Cookie: cookie,
	}, nil
}

// The method provenance returns a line for each value of the connection that was used so far,
// such as "user backup (VDDKCP_USER)". The lines do not contain secrets. There are no lines
// for values that neither the command line nor the environment nor a profile has.
func (f *serverFlags) provenance() []string {
	return f.login.provenance()
}

// The method logProvenance logs where the values of the connection come from. It logs no line
// twice. A command calls it after connection.
func (f *serverFlags) logProvenance(log *slog.Logger) {
	for _, line := range f.provenance() {
		if f.login.firstLog(line) {
			log.Debug(line)
		}
	}
}

// The method planLines returns the lines of a plan, as --dry-run prints it, that say where the values
// of the connection come from.
func (f *serverFlags) planLines() string {
	var text strings.Builder
	for _, line := range f.provenance() {
		fmt.Fprintf(&text, "connection: %s\n", line)
	}
	return text.String()
}

// The method protectSecrets protects the files that contain secrets from being overwritten by
// outputs.
func (f *serverFlags) protectSecrets(o *outputs) {
	f.protectSecretFlags(o)
	f.protectProfile(o)
}

// The method protectSecretFlags protects the files that the flags for secrets name.
func (f *serverFlags) protectSecretFlags(o *outputs) {
	o.protectSecret("the password", f.Password)
	o.protectSecret("the cookie", f.Cookie)
}

// The method protectProfile protects the files of the profile that is used, if there is one.
func (f *serverFlags) protectProfile(o *outputs) {
	if f.Profile == "" {
		return
	}
	if r, err := f.resolve(); err == nil {
		o.protectProfile(r.profile)
	}
}

// The method validate returns an error if the values do not name a server, or do not say how
// to log in.
func (r *settled) validate() error {
	var missing []string
	if r.server == "" {
		missing = append(missing, "--server")
	}
	if r.user == "" && !r.cookie.isSet() {
		missing = append(missing, "--user")
	}
	if !r.password.isSet() && !r.cookie.isSet() {
		missing = append(missing, "--password or --cookie")
	}
	if len(missing) > 0 {
		return usage.New("missing: "+strings.Join(missing, ", "),
			"the server and the login can be in a profile (--profile NAME), the password also in the environment variable VDDKCP_PASSWORD, or the cookie of an open session in VDDKCP_COOKIE")
	}
	if err := profile.CheckServer(r.server); err != nil {
		hint := hinted.Of(err)
		if hint != "" {
			hint = "if the server has another port than 443, pass the port with --port and not as a part of --server"
		}
		return usage.WithHint(fmt.Errorf("--server: %w", err), hint)
	}
	if r.thumbprint != "" {
		if _, err := certificate.ParseThumbprint(r.thumbprint); err != nil {
			return usage.Errorf("--thumbprint: %w", err)
		}
	}
	return nil
}

// secretSource is where a secret comes from: a flag, or the text itself from the environment
// or from a profile. If neither is set, there is no secret.
type secretSource struct {
	flag secretFlag
	text secret.Secret
	from string // what messages call the source, such as "--password"
}

func (s secretSource) isSet() bool { return s.text.IsSet() || s.flag.form != notGiven }

// The method expected returns the secret if it is known already. An empty secret stands for one
// that must still be read.
func (s secretSource) expected() secret.Secret {
	if s.flag.form != notGiven {
		return secret.New("")
	}
	return s.text
}
