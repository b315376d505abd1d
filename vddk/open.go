package vddk

import "context"

// libraryThumbprint returns the SHA-1 thumbprint that the library is to find, of
// the certificate that the user's parameters ask for.
func libraryThumbprint(ctx context.Context, p *Params) (string, error) {
	if !p.Remote() {
		return "", nil
	}
	return CheckThumbprint(ctx, p.Server, p.Port, p.Thumbprint)
}
