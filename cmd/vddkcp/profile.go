package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// profileCommand is vddkcp profile, which edits the profiles in the user's configuration file.
type profileCommand struct {
	Add    profileAddCommand    `cmd:"" help:"Store a server and a login as a profile. Asks on the terminal for what no flag gives."`
	List   profileListCommand   `cmd:"" help:"List the profiles."`
	Remove profileRemoveCommand `cmd:"" help:"Remove a profile from the user's configuration file."`
}

type profileListCommand struct {
	JSON bool `name:"json" help:"Print JSON."`
}

// listedProfile is a profile as vddkcp profile list --json prints it.
type listedProfile struct {
	Name        string `json:"name"`
	Server      string `json:"server"`
	Port        uint32 `json:"port,omitempty"`
	User        string `json:"user,omitempty"`
	Password    string `json:"password"` // "stored", "file" or "none"
	Cookie      string `json:"cookie"`
	Thumbprint  string `json:"thumbprint,omitempty"`
	NFCHostPort uint32 `json:"nfchostport,omitempty"`
	LibDir      string `json:"libdir,omitempty"`
	Via         string `json:"via,omitempty"`
	File        string `json:"file"`
}

func listed(p *profile.Profile) listedProfile {
	where := func(s profile.Secret) string {
		switch {
		case s.File != "":
			return "file"
		case s.IsSet():
			return "stored"
		}
		return "none"
	}
	return listedProfile{
		Name: p.Name, Server: p.Server, Port: p.Port, User: p.User, Password: where(p.Password), Cookie: where(p.Cookie),
		Thumbprint: p.Thumbprint, NFCHostPort: p.NFCHostPort, LibDir: p.LibDir, Via: p.Via, File: p.File,
	}
}

func (c *profileListCommand) Run(ctx context.Context, logs *logFlags) error {
	profiles, failed := newConfig().List()
	all := []listedProfile{}
	for _, p := range profiles {
		all = append(all, listed(p))
		if err := p.CheckAccess(); err != nil {
			logs.warn(err.Error())
		}
	}
	out := standardOutput(ctx)
	var err error
	if c.JSON {
		err = printJSON(out, all)
	} else if len(all) > 0 {
		table := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
		fmt.Fprintln(table, "NAME\tSERVER\tUSER\tPASSWORD\tFILE")
		for _, p := range all {
			server := p.Server
			if p.Port != 0 {
				server = net.JoinHostPort(profile.WithoutBrackets(p.Server), strconv.FormatUint(uint64(p.Port), 10))
			}
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", p.Name, printable.Name(server), printable.Name(p.User), p.Password, printable.Name(p.File))
		}
		err = table.Flush()
	}
	if err == nil {
		err = failed
	}
	if err != nil {
		return usage.Wrap(fmt.Errorf("profile list: %w", err))
	}
	return nil
}

type profileRemoveCommand struct {
	Name string `arg:"" name:"NAME" help:"The name of the profile."`
}

func (c *profileRemoveCommand) Run() error {
	config := newConfig()
	if err := config.Remove(c.Name); err != nil {
		return fmt.Errorf("profile remove: %w", err)
	}
	fmt.Fprintf(textOutput, "the profile %s is removed from %s\n", c.Name, config.UserFile())
	return nil
}

type profileAddCommand struct {
	Name string `arg:"" name:"NAME" help:"The name of the profile: letters, digits, dots, underscores and hyphens."`

	Server      string     `help:"Name or address of the ESXi host or vCenter server." placeholder:"HOST"`
	User        string     `help:"User name for the server." placeholder:"NAME"`
	Password    secretFlag `help:"Password to store. With +FILE, only the path of the file is stored. \"-\" asks for the password on the terminal, -FD reads it from a file descriptor, and any other VALUE is the password itself, which other users can see in the list of processes." placeholder:"-|+FILE|-FD|VALUE"`
	Thumbprint  string     `help:"SHA-1 or SHA-256 thumbprint that the server's certificate must have. Without this flag, a trusted authority must have signed the certificate, or you are asked whether to trust it." placeholder:"HEX"`
	Port        portFlag   `help:"Port of the server (default 443)." placeholder:"PORT"`
	NFCHostPort portFlag   `name:"nfchostport" help:"Port of the ESXi host for the disk data (default 902)." placeholder:"PORT"`
	LibDir      string     `name:"libdir" help:"The VDDK library: the folder of the distribution, its folder lib64, or the file of the library itself." placeholder:"DIR" type:"path"`
	Via         viaFlag    `help:"How to read disks on the server: vddk, nfc or auto (default)." enum:",auto,vddk,nfc" default:"" placeholder:"auto|vddk|nfc"`

	Yes     bool     `help:"Store the profile without asking. This flag does not make vddkcp trust a certificate that is not verified."`
	Force   bool     `help:"Replace a profile of that name."`
	Timeout patience `help:"Time limit for the answer of the server (default 30s)." default:"30s" placeholder:"TIME"`
}

func (c *profileAddCommand) Run(ctx context.Context, logs *logFlags) error {
	if err := c.run(ctx, logs.warn); err != nil {
		return fmt.Errorf("profile add: %w", err)
	}
	return nil
}

// errNotStored is the error if the user does not want to store the profile.
var errNotStored = errors.New("the profile is not stored")

func (c *profileAddCommand) run(ctx context.Context, warn func(string)) error {
	if err := profile.CheckName(c.Name); err != nil {
		return usage.Wrap(err)
	}
	config := newConfig()
	if err := c.checkFlags(); err != nil {
		return err
	}
	replace, err := c.mayReplace(ctx, config)
	if err != nil {
		return err
	}
	p := &profile.Profile{
		Name: c.Name, Server: c.Server, User: c.User, Thumbprint: c.Thumbprint,
		Port: uint32(c.Port), NFCHostPort: uint32(c.NFCHostPort), LibDir: c.LibDir, Via: string(c.Via),
	}
	if p.Server == "" {
		if p.Server, err = c.ask(ctx, "name or address of the server: "); err != nil {
			return err
		}
		if err := profile.CheckServer(p.Server); err != nil {
			return err
		}
	}
	if err := c.certify(ctx, p); err != nil {
		return err
	}
	if p.User == "" {
		if p.User, err = c.ask(ctx, "user name: "); err != nil {
			return err
		}
	}
	if p.Password, err = c.password(ctx, p, config.UserFile(), warn); err != nil {
		return err
	}
	if !c.Yes {
		if err := c.confirm(ctx, fmt.Sprintf("Store the profile %s in %s?", p.Name, config.UserFile())); err != nil {
			return err
		}
	}
	if err := config.Add(p, replace); err != nil {
		return err
	}
	fmt.Fprintf(textOutput, "the profile %s is stored in %s\n", p.Name, config.UserFile())
	return nil
}

// The method checkFlags checks the flags before vddkcp asks for anything. Without a terminal, all
// that vddkcp would ask for must be given.
func (c *profileAddCommand) checkFlags() error {
	if c.Server != "" {
		if err := profile.CheckServer(c.Server); err != nil {
			return usage.WithHint(fmt.Errorf("--server: %w", err), hinted.Of(err))
		}
	}
	if c.Thumbprint != "" {
		if _, err := certificate.ParseThumbprint(c.Thumbprint); err != nil {
			return usage.Errorf("--thumbprint: %w", err)
		}
	}
	var missing []string
	if c.Server == "" {
		missing = append(missing, "--server")
	}
	if c.User == "" {
		missing = append(missing, "--user")
	}
	if !c.Yes {
		missing = append(missing, "--yes")
	}
	if len(missing) == 0 || hasTerminal() {
		return nil
	}
	return usage.New("missing: "+strings.Join(missing, ", ")+", because there is no terminal to ask on", "give these flags, or run the command on a terminal")
}

// hasTerminal reports whether there is a terminal to ask the user on.
func hasTerminal() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	tty.Close()
	return true
}

// The method ask asks for a value that must not be empty.
func (c *profileAddCommand) ask(ctx context.Context, prompt string) (string, error) {
	text, err := askTerminal(ctx, prompt, visible)
	if err != nil {
		return "", err
	}
	if text = strings.TrimSpace(text); text == "" {
		return "", errNotStored
	}
	return text, nil
}

// The method confirm asks a question. Its error is errNotStored if the answer is not yes.
func (c *profileAddCommand) confirm(ctx context.Context, question string) error {
	answer, err := askTerminal(ctx, question+" (yes or no): ", visible)
	if err != nil {
		return err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "yes", "y":
		return nil
	}
	return errNotStored
}

// The method mayReplace reports whether a profile of the same name may be replaced, and asks the
// user if there is one. It also makes the command end at once if the configuration file has a
// mistake.
func (c *profileAddCommand) mayReplace(ctx context.Context, config *profile.Config) (bool, error) {
	old, err := config.UserProfile(c.Name)
	if err != nil || old == nil {
		return c.Force, err
	}
	if c.Force {
		return true, nil
	}
	if c.Yes || !hasTerminal() {
		return false, usage.New(fmt.Sprintf("%s has a profile %s", old.File, c.Name), "use --force to replace the profile")
	}
	return true, c.confirm(ctx, fmt.Sprintf("There is a profile %s for the server %s. Replace it?", c.Name, printable.Name(old.Server)))
}

// The method certify gets the certificate of the server and shows it. It makes sure that the
// certificate is verified, has the thumbprint of the profile, or is trusted by the user. In the
// last case, it sets the thumbprint of the profile.
func (c *profileAddCommand) certify(ctx context.Context, p *profile.Profile) error {
	host := profile.WithoutBrackets(p.Server)
	got, err := fetchCertificate(ctx, host, p.Port, time.Duration(c.Timeout))
	if err != nil {
		return hinted.Error(fmt.Errorf("cannot get the certificate of %s: %w", printable.Name(p.Server), err),
			"check the name and the port of the server, and whether this machine can reach it")
	}
	facts := factsOf(host, cmp.Or(p.Port, certificate.DefaultPort), got)
	if p.Thumbprint != "" {
		want, err := certificate.ParseThumbprint(p.Thumbprint)
		if err != nil {
			return usage.Errorf("--thumbprint: %w", err)
		}
		if want != got.SHA1 && want != got.SHA256 {
			return usage.Errorf("--thumbprint: the certificate of %s has the SHA-256 thumbprint %s and the SHA-1 thumbprint %s, not %s", printable.Name(p.Server), got.SHA256, got.SHA1, want)
		}
	}
	w := bufio.NewWriter(textOutput)
	facts.printText(w)
	if err := w.Flush(); err != nil {
		return err
	}
	if p.Thumbprint != "" || got.Trust == nil {
		return nil
	}
	if c.Yes {
		return usage.New(fmt.Sprintf("the certificate of %s is not verified: %v", printable.Name(p.Server), got.Trust),
			"compare the thumbprint with the one that the host itself shows, and then give it with --thumbprint")
	}
	if err := c.confirm(ctx, fmt.Sprintf("The certificate is not verified. Its SHA-256 thumbprint is %s.\nCompare it with the one that the host itself shows. Trust this certificate?", got.SHA256)); err != nil {
		return err
	}
	p.Thumbprint = got.SHA256
	return nil
}

// The method password returns the password of the profile, or where it is. On a terminal, it asks
// for the values that no flag gives.
func (c *profileAddCommand) password(ctx context.Context, p *profile.Profile, config string, warn func(string)) (profile.Secret, error) {
	flag := c.Password
	if flag.form == notGiven {
		if c.Yes {
			return profile.Secret{}, nil
		}
		file, err := askTerminal(ctx, fmt.Sprintf("file that has the password in its first line (empty: type the password, which is stored in %s): ", config), visible)
		if err != nil {
			return profile.Secret{}, err
		}
		flag = secretFlag{form: onTerminal}
		if file = strings.TrimPrefix(strings.TrimSpace(file), "+"); file != "" {
			flag = secretFlag{form: inFile, value: file}
		}
	}
	if flag.form == inPlain {
		warn("other users of this host can see a --password on the command line: use -, +FILE or -FD instead")
	}
	label := fmt.Sprintf("password of %s at %s", printable.Name(p.User), printable.Name(p.Server))
	if c.Password.form == notGiven {
		label += " (empty: store none)"
	}
	text, err := flag.read(ctx, nil, label)
	if err != nil {
		return profile.Secret{}, usage.WithHint(fmt.Errorf("--password: %w", err), hinted.Of(err))
	}
	if flag.form == inFile {
		path, err := filepath.Abs(flag.value)
		return profile.Secret{File: path}, err
	}
	if text.Reveal() == "" {
		return profile.Secret{}, nil
	}
	return profile.Secret{Text: text}, nil
}
